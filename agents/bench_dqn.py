"""DQN beside Stable-Baselines3's, on Pong and CartPole: `perennial bench dqn`.

On Pong an update of 32 transitions every 4 env steps (16 frames), so convolutions are what costs.
Beside the rates stand what the environment alone, and torch's own convolutions and products of
acting and of updates, would allow on the same cores.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TextIO

from perennial.agents.run import cores
from perennial.agents.side_by_side import ROUNDS, Table, ours, peer

_PONG, _PONG_STEPS, _PONG_WARM = "ALE/Pong-v5", 2500, 1000
_CARTPOLE, _CARTPOLE_STEPS, _CARTPOLE_WARM = "CartPole-v1", 8000, 1000
_BATCH, _EVERY = 32, 4
_OPTIONS = {
    "learning_rate": 1e-4,
    "buffer_size": 100_000,
    "learning_starts": 500,
    "batch_size": _BATCH,
    "train_freq": _EVERY,
    "gradient_steps": 1,
    "target_update_interval": 1000,
    "exploration_fraction": 0.1,
    "exploration_final_eps": 0.01,
}

# What an SB3 user would write; prints env steps per second after the warm-up.
_SB3_DQN = """
import sys, time, tempfile, torch
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
env, threads, steps, warm = sys.argv[1], *map(int, sys.argv[2:5])
torch.set_num_threads(threads)
class Clock(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == warm: self.begun = time.perf_counter()
        return True
clock, options = Clock(), eval(sys.argv[5])
with tempfile.TemporaryDirectory() as logs:
    options |= {"tensorboard_log": logs, "device": "cpu"}
    if env.startswith("ALE/"):
        import ale_py, gymnasium
        from stable_baselines3.common.env_util import make_atari_env
        from stable_baselines3.common.vec_env import VecFrameStack
        gymnasium.register_envs(ale_py)
        given = {"frameskip": 1, "full_action_space": True}
        model = DQN("CnnPolicy", VecFrameStack(make_atari_env(env, env_kwargs=given), 4), **options)
    else:
        model = DQN("MlpPolicy", env, policy_kwargs={"net_arch": [256, 256]}, **options)
    model.learn(steps, callback=clock)
print((steps - warm) / (time.perf_counter() - clock.begun))
"""
_ALONE = "from perennial.agents import bench_dqn; print(bench_dqn.{}())"


def _rate(work: Callable[[], Any], seconds: float = 3.0) -> float:
    for _ in range(10):
        work()
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        work()
        done += 1
    return done / (time.perf_counter() - begun)


def environment_alone() -> float:
    """Env steps per second of random actions on Pong, no learning."""
    import numpy as np

    from perennial.envs.vector import make_vec

    args: dict[str, Any] = {"games": ("Pong",), "change_every": 10**9}
    envs = make_vec("perennial/AtariSwitch-v0", 1, schedule_seeds=(0,), **args)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    return _rate(lambda: envs.step(rng.integers(0, 18, 1)))


def acting_alone() -> float:
    """Actions per second, were one its convolutions and matrix products and nothing else."""
    return _rate(_products(1)[0])


def updates_alone() -> float:
    """Updates per second of this thread, were one its convolutions and products and no more."""
    forward, backward = _products(_BATCH)

    def update() -> None:
        forward()
        forward()  # the target network's
        backward()

    return _rate(update)


def _products(rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward arithmetic of the Nature CNN, each layer on numbers of its own."""
    import torch

    from perennial.agents.convnets import NATURE

    torch.set_num_threads(1)
    last, side, channels = torch.channels_last, 84, 4
    layers = []
    for n_out, kernel, stride in NATURE[0]:
        x = torch.randn(rows, channels, side, side).contiguous(memory_format=last)
        weight = torch.randn(n_out, channels, kernel, kernel)
        side, channels = (side - kernel) // stride + 1, n_out
        gradient = torch.randn(rows, channels, side, side).contiguous(memory_format=last)
        layers.append((x, weight, gradient, stride))
    widths = (channels * side * side, *NATURE[1], 18)
    dense = [
        (torch.randn(rows, a), torch.randn(b, a), torch.randn(rows, b))
        for a, b in itertools.pairwise(widths)
    ]

    def forward() -> None:
        for x, weight, _, stride in layers:
            torch.conv2d(x, weight, None, stride)
        for x, weight, _ in dense:
            x @ weight.t()

    def backward() -> None:
        for k, (x, weight, gradient, stride) in enumerate(layers):
            torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1,
                [k > 0, True, False],
            )  # fmt: skip
        for x, weight, gradient in dense:
            gradient @ weight
            gradient.t() @ x

    return forward, backward


def _ours(env: str, steps: int, **given: Any) -> tuple[float, dict[str, float]]:
    """Env steps per second over all seeds, and seconds by part of the loop."""
    own = {"env": env, "steps": steps, "metrics_every": max(2000, steps // 4)}
    if env == _PONG:
        own |= {"env": "perennial/AtariSwitch-v0", "env_args": {"games": "Pong"}}
    return ours("dqn", {**_OPTIONS, **own, **given})


def bench_dqn(stream: TextIO) -> dict[str, Any]:
    """DQN on Pong and CartPole: one seed on all cores, a seed per core; Pong's parts alone."""
    table, available = Table(), cores()
    seconds: dict[str, float] = {}
    pong, side = "Pong, 1 seed", f"Pong, {available} seeds"
    for k in range(ROUNDS):
        print(f"round {k + 1} of {ROUNDS} ...", file=stream, flush=True)
        words = _PONG, available, _PONG_STEPS, _PONG_WARM, repr(_OPTIONS)
        table.add(f"sb3, {pong}", peer(_SB3_DQN, *words, threads=available))
        rate, parts = _ours(_PONG, _PONG_STEPS)
        table.add(f"perennial, {pong}", rate)
        for part, value in parts.items():
            seconds[part] = seconds.get(part, 0.0) + value
        words = _PONG, 1, _PONG_STEPS, _PONG_WARM, repr(_OPTIONS)
        table.add(f"sb3, {side}", peer(_SB3_DQN, *words, processes=available))
        table.add(f"perennial, {side}", _ours(_PONG, _PONG_STEPS, seeds=available)[0])
        words = _CARTPOLE, 1, _CARTPOLE_STEPS, _CARTPOLE_WARM, repr(_OPTIONS)
        table.add("sb3, CartPole", peer(_SB3_DQN, *words))
        table.add("perennial, CartPole", _ours(_CARTPOLE, _CARTPOLE_STEPS)[0])
        alone = {
            name: peer(_ALONE.format(name), processes=count)
            for name, count in (
                ("environment_alone", 1), ("acting_alone", 1), ("updates_alone", available)
            )
        }  # fmt: skip
        table.add("Pong alone", alone["environment_alone"])
        table.add("acting: torch's operations alone", alone["acting_alone"])
        table.add("updating: torch's operations alone, all cores", _EVERY * alone["updates_alone"])
        inverse = sum(1 / table.rows[name][-1] for name in list(table.rows)[-3:])
        table.add("Pong, acting and updating in turn, by torch", 1 / inverse)
    spent = sum(seconds.values())
    ratios = {
        "Pong, 1 seed: perennial / sb3": table.ratio(f"perennial, {pong}", f"sb3, {pong}"),
        f"{side}: perennial / sb3": table.ratio(f"perennial, {side}", f"sb3, {side}"),
        "CartPole: perennial / sb3": table.ratio("perennial, CartPole", "sb3, CartPole"),
        "Pong, 1 seed: of all three in turn, by torch": table.ratio(
            f"perennial, {pong}", "Pong, acting and updating in turn, by torch"
        ),
        **{f"share of time: {part}": value / spent for part, value in seconds.items()},
    }
    return table.show(stream, "env steps/s", ratios)
