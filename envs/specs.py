"""Which environments there are and which parameters they take; imports no simulator.

One table serves the command line (strings), the constructors (values) and `perennial list envs`.
"""

import ast
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from perennial.envs import schedules
from perennial.envs.atari_games import ATARI_PARAMS, Tour, check_atari, make_entries
from perennial.envs.params import Param, nearest


@dataclass(frozen=True)
class EnvEntry:
    """One of our environments: a line of help, its modules, and its parameters."""

    env_id: str
    line: str
    needs: tuple[str, ...]  # modules that must be importable
    extra: str | None  # the extra of this distribution that brings them
    params: tuple[Param, ...]
    check: Callable[[Mapping[str, Any]], None]  # of all parameters together
    discrete: bool = False  # whether actions are chosen from a few, else they are numbers

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameter name -> default."""
        return {param.name: param.default for param in self.params}


LEAST_FRICTION, MOST_FRICTION = 1e-5, 1e4  # below 1e-5 MuJoCo uses 1e-5 whatever is asked for

SCHEDULE_PARAMS = (
    Param("change_every", "int", 2_000_000, "env steps of the seed from one change to the next",
          low=1),
    Param("schedule", "choice", "log-uniform", "how the values of the tasks come about",
          choices=schedules.KINDS),
    Param("period", "int", None, "env steps of a linear drift, or of one sinusoidal swing",
          low=1, optional=True),
    Param("change", "choice", "episode", "changes wait for an episode's end, or come at once",
          choices=("episode", "now")),
    Param("reference", "choice", None, "nature: count from the last change, at episode ends, as "
          "the published code does", choices=("nature",), optional=True),
    Param("task", "int", None, "stay in this task of the schedule for ever", low=0, optional=True),
)  # fmt: skip

SLIPPERY_ANT_PARAMS = (
    Param("friction", "numbers", (0.02, 2.0), "range of the sliding friction of all geoms; a linear"
          " drift goes from the first number to the second", size=2,
          low=LEAST_FRICTION, high=MOST_FRICTION),
    Param("frictions", "numbers", None, "the values of schedule=list or schedule=cycle",
          optional=True, low=LEAST_FRICTION, high=MOST_FRICTION),
    *SCHEDULE_PARAMS,
    Param("observation", "choice", "v5", "v5: 105 numbers; v4: 27, no contact forces; v3: the "
          "published 111, of which 84 are zero", choices=("v5", "v4", "v3")),
    Param("contact_cost", "flag", None, "charge Ant-v5's contact cost; none: yes, but for v3",
          optional=True),
    Param("max_episode_steps", "int", 1000, "time limit of an episode; none: no limit",
          low=1, optional=True),
)  # fmt: skip


def _check_slippery_ant(args: Mapping[str, Any]) -> None:
    low, high = args["friction"]
    if low > high and args["schedule"] != "linear":
        raise ValueError(f"friction={low:g},{high:g}: the lower number comes first")
    schedules.make_values(args["schedule"], args["friction"], args["frictions"], args["period"])
    check_clock(args)


def check_clock(args: Mapping[str, Any]) -> None:
    """Refuse a reference that cannot go with when changes happen."""
    if args["reference"] == "nature" and args["change"] == "now":
        raise ValueError("reference=nature changes at episode ends: drop change=now")


ENVS: dict[str, EnvEntry] = {
    "perennial/SlipperyAnt-v0": EnvEntry(
        "perennial/SlipperyAnt-v0",
        "MuJoCo ant on ground whose friction changes",
        ("mujoco",),
        None,
        SLIPPERY_ANT_PARAMS,
        _check_slippery_ant,
    ),
    "perennial/AtariSwitch-v0": EnvEntry(
        "perennial/AtariSwitch-v0",
        "Atari games in turn, all 18 actions, sticky",
        ("ale_py", "cv2"),
        "atari",
        ATARI_PARAMS,
        check_atari,
        discrete=True,
    ),
}

# Modules that Gymnasium's own environments need, by the package that holds them.
_GYMNASIUM_NEEDS = {
    "gymnasium.envs.mujoco": ("mujoco", "mujoco"),
    "gymnasium.envs.box2d": ("Box2D", "box2d"),
}


def check_env(env_id: str) -> None:
    """Refuse an unknown environment or one whose simulator is not installed.

    Raises:
        ValueError: One line: the nearest id, or the extra to install.
    """
    if env_id in ENVS:
        entry = ENVS[env_id]
        for module in entry.needs:
            if importlib.util.find_spec(module) is None:
                package = f"perennial-rl[{entry.extra}]" if entry.extra else "perennial-rl"
                raise ValueError(f"{env_id} needs {module}: pip install '{package}'")
        return
    import gymnasium

    module, colon, name = env_id.partition(":")
    if colon:  # "module:Env-v0", as gymnasium.make takes it: the module registers its ids
        if not importlib.util.find_spec(module.split(".")[0]):
            raise ValueError(f"environment {env_id}: there is no module {module} to import")
        importlib.import_module(module)
    else:
        name = env_id
    if name.startswith("ALE/") and not colon:
        game = name.removeprefix("ALE/").partition("-")[0]
        ours = f"--env perennial/AtariSwitch-v0 --env-args games={game}"
        raise ValueError(f"{env_id} is ale_py's own; ours of the same game: {ours}")
    if name not in gymnasium.registry:
        known = [*ENVS, *gymnasium.registry]
        raise ValueError(f"no environment {env_id}: {nearest(name, known, listed=False)}")
    entry_point = gymnasium.registry[name].entry_point
    for package, (needed, extra) in _GYMNASIUM_NEEDS.items():
        inside = isinstance(entry_point, str) and entry_point.startswith(package)
        if inside and importlib.util.find_spec(needed) is None:
            raise ValueError(f"{env_id} needs {needed}: pip install 'gymnasium[{extra}]'")


def check_actions(env_id: str, agent: str, discrete: bool | None) -> None:
    """Refuse one of our environments whose actions are not of the agent's kind (None: any).

    Raises:
        ValueError: One line: what would fit.
    """
    if discrete is None or env_id not in ENVS or ENVS[env_id].discrete == discrete:
        return
    if discrete:
        raise ValueError(f"{agent} chooses among actions; {env_id}'s are numbers: take sac or ppo")
    raise ValueError(f"{agent}'s actions are numbers; {env_id}'s are choices: take dqn or ppo")


def check_args(env_id: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The environment's arguments, parsed from strings where they are strings, and checked.

    Args:
        env_id: One of our ids, or any registered one (its arguments are read as Python literals).
        args: Name -> string from the command line, or Python value.

    Returns:
        The given arguments only; the rest keep their defaults.

    Raises:
        ValueError: One line that names the clash and the fix.
    """
    if env_id not in ENVS:
        return _foreign_args(env_id, args)
    entry = ENVS[env_id]
    params = {param.name: param for param in entry.params}
    parsed: dict[str, Any] = {}
    for name, value in args.items():
        if name == "schedule_seed":
            raise ValueError("schedule_seed is the seed's own number: choose it with --seeds")
        if name not in params:
            raise ValueError(f"{env_id} takes no {name}: {nearest(name, params)}")
        parsed[name] = params[name].parse(value)
    entry.check({**entry.defaults, **parsed})
    return parsed


def game_names(env_id: str, args: Mapping[str, Any]) -> tuple[str, ...]:
    """The games that come round, as the log calls them; () where an environment has none."""
    if env_id != "perennial/AtariSwitch-v0":
        return ()
    return tuple(entry.name for entry in make_entries({**ENVS[env_id].defaults, **args}))


def task_names(env_id: str, args: Mapping[str, Any], seed: int) -> Callable[[int], str] | None:
    """Task of the seed's schedule -> one of `game_names`; None where there are none.

    Args:
        env_id: An environment's id.
        args: Its parameters, as `check_args` returns them.
        seed: The schedule's seed.
    """
    if not game_names(env_id, args):
        return None
    tour = Tour({**ENVS[env_id].defaults, **args}, seed)
    return lambda task: tour.entry(task).name


def frame_stack(env_id: str, args: Mapping[str, Any]) -> int:
    """How many frames an observation stacks along its first axis, the newest last; 0: none."""
    if env_id != "perennial/AtariSwitch-v0":
        return 0
    return int(args.get("stack", ENVS[env_id].defaults["stack"]))


def block_size(num_envs: int, seeds: int) -> int:
    """Lanes per seed; ValueError where the lanes do not divide into equal blocks."""
    if num_envs < 1 or seeds < 1 or num_envs % seeds:
        raise ValueError(f"{num_envs} lanes do not divide into equal blocks for {seeds} seeds")
    return num_envs // seeds


def _foreign_args(env_id: str, args: Mapping[str, Any]) -> dict[str, Any]:
    if not args:
        return {}
    from gymnasium.envs.registration import load_env_creator, registry

    creator: Any = registry[env_id.rpartition(":")[2]].entry_point
    if isinstance(creator, str):
        creator = load_env_creator(creator)
    signature = inspect.signature(creator)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    known = [*signature.parameters, "max_episode_steps"]
    for name in args:
        if name not in known and not takes_any:
            raise ValueError(f"{env_id} takes no {name}: {nearest(name, known)}")
    return {name: _literal(value) for name, value in args.items()}


def _literal(value: Any) -> Any:
    """A command line string as the Python literal it spells, else as the string it is."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
