"""Engines that step Atari, without an agent: `perennial bench atari`.

Ours can go on exactly from a saved state; ale-py's own vector environment steps in C++ threads but
has no state to save; Gymnasium's wrappers are what most code uses. All play the same protocol: 18
actions, sticky, 4 frames a step, 84x84 grey, stack 4, the next episode starting in the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from perennial.agents.config import UsageError
from perennial.agents.side_by_side import ROUNDS, Table

_GAME, _ROM = "SpaceInvaders", "space_invaders"
_SECONDS = 1.5  # of each figure in each round
_LANES = 8


def _rate(step: Callable[[], Any], lanes: int) -> float:
    """Steps of lanes per second."""
    for _ in range(20):
        step()
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < _SECONDS:
        for _ in range(10):
            step()
        done += 10 * lanes
    return done / (time.perf_counter() - begun)


def _play(envs: Any, lanes: int) -> float:
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    rate = _rate(lambda: envs.step(rng.integers(0, 18, lanes)), lanes)
    envs.close()
    return rate


def _ours(lanes: int, threads: int) -> float:
    from perennial.envs.vector import make_vec

    args: dict[str, Any] = {"games": _GAME, "change_every": 10**9}
    return _play(
        make_vec("perennial/AtariSwitch-v0", lanes, schedule_seeds=(0,), threads=threads, **args),
        lanes,
    )


def _ale(lanes: int, threads: int) -> float:
    from ale_py.vector_env import AtariVectorEnv
    from gymnasium.vector import AutoresetMode

    envs = AtariVectorEnv(
        _ROM,
        lanes,
        num_threads=threads,
        repeat_action_probability=0.25,
        full_action_space=True,
        noop_max=0,
        reward_clipping=False,
        use_fire_reset=False,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    return _play(envs, lanes)


def _gymnasium(lanes: int) -> float:
    import ale_py
    import gymnasium as gym
    from gymnasium.vector import AutoresetMode, SyncVectorEnv
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    gym.register_envs(ale_py)

    def make() -> Any:
        env = gym.make(f"ALE/{_GAME}-v5", frameskip=1, full_action_space=True)
        env = AtariPreprocessing(env, noop_max=0, frame_skip=4)
        return FrameStackObservation(env, 4, padding_type="zero")

    return _play(SyncVectorEnv([make] * lanes, autoreset_mode=AutoresetMode.SAME_STEP), lanes)


def _emulator() -> tuple[float, float]:
    """Per second: four frames of one console and nothing else; pictures of two frames."""
    import cv2

    from perennial.envs.atari import Emulators

    ale, rng = Emulators().take(_GAME), np.random.default_rng(0)
    ale.reset_game()
    screen, other = (np.empty(ale.getScreenDims(), np.uint8) for _ in range(2))

    def frames() -> None:
        for action in rng.integers(0, 18, 4).tolist():
            ale.act(action)
        if ale.game_over():
            ale.reset_game()

    def picture() -> None:
        ale.getScreenGrayscale(other)
        ale.getScreenGrayscale(screen)
        np.maximum(screen, other, out=screen)
        cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)

    return _rate(frames, 1), _rate(picture, 1)


def bench_atari(stream: TextIO) -> dict[str, Any]:
    """Steps per second of three engines on 1 lane and on 8, and what the emulator alone takes."""
    try:
        import ale_py  # noqa: F401
        import cv2  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"bench atari needs {error.name}: pip install 'perennial-rl[atari]'"
        ) from None
    table, many = Table(), f"{_LANES} lanes"
    for k in range(ROUNDS):
        print(f"round {k + 1} of {ROUNDS} ...", file=stream, flush=True)
        for lanes, threads in ((1, 1), (_LANES, 1), (_LANES, 2)):
            name = f"{lanes} lanes, {threads} threads" if lanes > 1 else "1 lane"
            table.add(f"perennial, {name}", _ours(lanes, threads))
            table.add(f"AtariVectorEnv, {name}", _ale(lanes, threads))
        table.add("Gymnasium's wrappers, 1 lane", _gymnasium(1))
        table.add(f"Gymnasium's wrappers, {many}", _gymnasium(_LANES))
        frames, pictures = _emulator()
        table.add("four frames of a console, no picture", frames)
        table.add("picture of two frames", pictures)
    ratios = {
        f"{name}: perennial / {peer}": table.ratio(f"perennial, {name}", f"{peer}, {theirs}")
        for name in ("1 lane", f"{many}, 1 threads", f"{many}, 2 threads")
        for peer, theirs in (
            ("AtariVectorEnv", name),
            ("Gymnasium's wrappers", "1 lane" if name == "1 lane" else many),
        )
    }
    alone = "four frames of a console, no picture"
    ratios["1 lane: perennial / the console's frames"] = table.ratio("perennial, 1 lane", alone)
    return table.show(stream, "env steps/s", ratios)
