"""SAC beside Stable-Baselines3's on Ant-v5: `perennial bench sac`.

One update of 256 transitions per env step, so updates are what costs. Beside the rates stand what
the environment alone and the matrix products of the updates alone would allow on the same cores.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, TextIO

from perennial.agents.run import cores
from perennial.agents.side_by_side import ROUNDS, Table, ours, peer

_ENV, _STEPS, _WARM = "Ant-v5", 2000, 1000
_OBSERVED, _ACTED, _WIDTH, _BATCH = 105, 8, 256, 256

# What an SB3 user would write; prints env steps per second after the warm-up.
_SB3_SAC = """
import sys, time, tempfile, torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
env, threads, steps, warm = sys.argv[1], *map(int, sys.argv[2:5])
torch.set_num_threads(threads)
class Clock(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == warm: self.begun = time.perf_counter()
        return True
clock = Clock()
with tempfile.TemporaryDirectory() as logs:
    model = SAC("MlpPolicy", env, tensorboard_log=logs, device="cpu")
    model.learn(steps, callback=clock)
print((steps - warm) / (time.perf_counter() - clock.begun))
"""
_ALONE = "from perennial.agents import bench_sac; print(bench_sac.{}())"


def environment_alone() -> float:
    """Env steps per second of random actions, no learning."""
    import gymnasium as gym

    env = gym.make(_ENV)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(2000)]
    begun = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return len(actions) / (time.perf_counter() - begun)


def products_alone() -> float:
    """Updates per second of this thread, were an update its matrix products and nothing else."""
    import torch

    torch.set_num_threads(1)

    def layers(*widths: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        return [
            (torch.randn(_BATCH, a), torch.randn(a, b), torch.randn(_BATCH, b))
            for a, b in itertools.pairwise(widths)
        ]

    actor = layers(_OBSERVED, _WIDTH, _WIDTH, 2 * _ACTED)
    critic = layers(_OBSERVED + _ACTED, _WIDTH, _WIDTH, 1)

    def update() -> None:
        # Forward: actor on both observations; of two critics the targets, and the nets twice.
        for x, weight, _ in actor * 2 + critic * 6:
            x @ weight
        # Backward to weights: actor and both critics, once.
        for x, _, gradient in actor + critic * 2:
            x.T @ gradient
        # Backward to inputs: to all layers but the first, and for the actor's loss to the actions.
        for _, weight, gradient in actor[1:] + critic[1:] * 4:
            gradient @ weight.T
        for _, weight, gradient in critic[:1] * 2:
            gradient @ weight[-_ACTED:].T

    for _ in range(20):
        update()
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < 3.0:
        for _ in range(20):
            update()
        done += 20
    return done / (time.perf_counter() - begun)


def _ours(seeds: int) -> tuple[float, dict[str, float]]:
    """Env steps per second over all seeds, and seconds by part of the loop."""
    given = {"env": _ENV, "seeds": seeds, "steps": _STEPS, "metrics_every": 2000}
    return ours("sac", given)


def bench_sac(stream: TextIO) -> dict[str, Any]:
    """SAC on the ant: one seed on all cores, a seed per core, and what bounds both."""
    table, available = Table(), cores()
    seconds: dict[str, float] = {}
    alone, side = f"1 seed, {available} threads", f"{available} seeds, 1 core each"
    for k in range(ROUNDS):
        print(f"round {k + 1} of {ROUNDS} ...", file=stream, flush=True)
        words = _ENV, available, _STEPS, _WARM
        table.add(f"sb3, {alone}", peer(_SB3_SAC, *words, threads=available))
        rate, parts = _ours(1)
        table.add(f"perennial, {alone}", rate)
        for part, value in parts.items():
            seconds[part] = seconds.get(part, 0.0) + value
        words = _ENV, 1, _STEPS, _WARM
        table.add(f"sb3, {side}", peer(_SB3_SAC, *words, processes=available))
        table.add(f"perennial, {side}", _ours(available)[0])
        table.add("environment alone", peer(_ALONE.format("environment_alone")))
        bound = peer(_ALONE.format("products_alone"), processes=available)
        table.add("matrix products alone, all cores", bound)
    spent = sum(seconds.values())
    ratios = {
        f"{alone}: perennial / sb3": table.ratio(f"perennial, {alone}", f"sb3, {alone}"),
        f"{side}: perennial / sb3": table.ratio(f"perennial, {side}", f"sb3, {side}"),
        f"{alone}: of the products' bound": table.ratio(
            f"perennial, {alone}", "matrix products alone, all cores"
        ),
        f"{side}: of the products' bound": table.ratio(
            f"perennial, {side}", "matrix products alone, all cores"
        ),
        **{f"share of time: {part}": value / spent for part, value in seconds.items()},
    }
    return table.show(stream, "env steps/s", ratios)
