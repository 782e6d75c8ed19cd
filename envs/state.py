"""Exact save and restore of environments that were not built for it.

A state is a nested dict of numpy arrays and JSON values. Exact: Gymnasium's classic control and toy
text, its MuJoCo tasks (the engine's own state and what a reward remembers of the last step), and
whatever defines `get_state()` and `set_state(state)` itself. Pickling an environment is not exact:
many rebuild themselves when loaded.
"""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

# Wrappers that `gym.make(..., disable_env_checker=True)` may put around, with what they remember.
_WRAPPER_MEMORY: dict[str, tuple[str, ...]] = {
    "TimeLimit": ("_elapsed_steps",),
    "OrderEnforcing": ("_has_reset", "_has_rendered"),
    "ClipAction": (),
    "RescaleAction": (),
    "RescaleObservation": (),
    "FlattenObservation": (),
    "DtypeObservation": (),
    "TransformAction": (),
    "TransformObservation": (),
    "TransformReward": (),
}
# Positions and forces derived by the last step: some rewards compare with them, and the engine's
# integration state leaves them out.
_DERIVED = (
    "xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat",
    "cinert", "cvel", "cfrc_ext", "qfrc_actuator", "qfrc_constraint", "qacc", "subtree_com",
    "sensordata",
)  # fmt: skip
_SKIPPED_ATTRIBUTES = {"_np_random_seed", "render_mode", "fullpath"}  # of this process or machine
_BIT_GENERATORS = {
    cls.__name__: cls
    for cls in (np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64,
                np.random.MT19937)
}  # fmt: skip


def generator_from_state(state: dict[str, Any]) -> np.random.Generator:
    """A generator that goes on from `generator.bit_generator.state`."""
    name = state["bit_generator"]
    if name not in _BIT_GENERATORS:
        raise ValueError(f"the saved state names an unknown random generator: {name}")
    bit_generator: Any = _BIT_GENERATORS[name]()
    bit_generator.state = state
    return np.random.Generator(bit_generator)


def capture(env: gym.Env[Any, Any]) -> dict[str, Any]:
    """The state of a wrapped environment. `["exact"]` says whether `restore` will go on from it.

    Where it is not, only the random stream is kept.
    """
    base: Any = env.unwrapped
    rng = base._np_random
    state: dict[str, Any] = {
        "kind": _kind(env),
        "rng": None if rng is None else rng.bit_generator.state,
    }
    state["exact"] = state["kind"] != "fresh"
    if not state["exact"]:
        return state
    state["wrappers"] = [
        {name: getattr(layer, name) for name in names if hasattr(layer, name)}
        for layer, names in _wrappers(env)
    ]
    if state["kind"] == "own":
        state["own"] = base.get_state()
        return state
    state["attributes"] = {
        name: _packed(value)
        for name, value in vars(base).items()
        if name not in _SKIPPED_ATTRIBUTES and _is_plain(value)
    }
    if state["kind"] == "mujoco":
        state["mujoco"] = _capture_mujoco(base)
    return state


def restore(env: gym.Env[Any, Any], state: dict[str, Any]) -> Any | None:
    """Go on from a `capture`. Where that was not exact: a fresh episode, whose observation returns.

    Raises:
        ValueError: The state is of another kind of environment.
    """
    base: Any = env.unwrapped
    if state["rng"] is not None:
        base._np_random = generator_from_state(state["rng"])
    if not state["exact"]:
        observation, _ = env.reset()
        return observation
    wrappers = list(_wrappers(env))
    if state["kind"] != _kind(env) or len(wrappers) != len(state["wrappers"]):
        raise ValueError(f"the saved state is not of {env.spec.id if env.spec else base}")
    for (layer, _), memory in zip(wrappers, state["wrappers"], strict=True):
        for name, value in memory.items():
            setattr(layer, name, value)
    if state["kind"] == "own":
        base.set_state(state["own"])
        return None
    for name, value in state["attributes"].items():
        if _is_plain(getattr(base, name, None)):  # not over a screen that is open here
            setattr(base, name, _unpacked(value))
    if state["kind"] == "mujoco":
        _restore_mujoco(base, state["mujoco"])
    return None


def _kind(env: gym.Env[Any, Any]) -> str:
    base: Any = env.unwrapped
    if any(names is None for _, names in _layers(env)):
        return "fresh"
    classes = [cls.__module__ for cls in type(base).__mro__]
    if "gymnasium.envs.mujoco.mujoco_env" in classes:  # before "own": its set_state is another
        return "mujoco"
    if classes[0].startswith(("gymnasium.envs.classic_control", "gymnasium.envs.toy_text")):
        return "attributes"
    if callable(getattr(base, "get_state", None)) and callable(getattr(base, "set_state", None)):
        return "own"
    return "fresh"


def _layers(env: gym.Env[Any, Any]) -> Iterator[tuple[Any, tuple[str, ...] | None]]:
    """Each wrapper from the outside in, with what it remembers; None: not known."""
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        known = type(layer).__module__.startswith("gymnasium.wrappers")
        yield layer, _WRAPPER_MEMORY.get(type(layer).__name__) if known else None
        layer = layer.env


def _wrappers(env: gym.Env[Any, Any]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    for layer, names in _layers(env):
        assert names is not None
        yield layer, names


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"
    return value is None or isinstance(value, bool | int | float | str | np.number | np.bool_)


def _packed(value: Any) -> Any:
    """A plain value as arrays and JSON values: tuples and numpy scalars are marked."""
    if isinstance(value, tuple):
        return {"tuple": [_packed(item) for item in value]}
    if isinstance(value, list):
        return [_packed(item) for item in value]
    if isinstance(value, np.generic):
        return {"scalar": np.array([value])}
    return value.copy() if isinstance(value, np.ndarray) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_unpacked(item) for item in value["tuple"])
        return value["scalar"][0]
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    return value.copy() if isinstance(value, np.ndarray) else value


def _capture_mujoco(base: Any) -> dict[str, Any]:
    import mujoco

    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    physics = np.empty(mujoco.mj_stateSize(base.model, kind))
    mujoco.mj_getState(base.model, base.data, physics, kind)
    derived = {name: np.array(getattr(base.data, name)) for name in _DERIVED}
    return {"physics": physics, "derived": derived}


def _restore_mujoco(base: Any, state: dict[str, Any]) -> None:
    import mujoco

    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    physics = np.ascontiguousarray(state["physics"], dtype=np.float64)
    size = mujoco.mj_stateSize(base.model, kind)
    if physics.shape != (size,):
        raise ValueError(f"the saved physics has {physics.size} numbers, this model's has {size}")
    mujoco.mj_setState(base.model, base.data, physics, kind)
    for name, values in state["derived"].items():
        getattr(base.data, name)[:] = values
