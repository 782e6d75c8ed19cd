"""PPO beside Stable-Baselines3's on the ant: `perennial bench ppo`."""

from __future__ import annotations

import statistics
import time
from typing import Any, TextIO

from perennial.agents.run import cores
from perennial.agents.side_by_side import ROUNDS, Table, ours, peer

_ROLLOUTS = 10  # of which the first is warm-up
_PPO = {"n_steps": 2048, "batch_size": 128, "n_epochs": 10, "learning_rate": 1e-4}

# What an SB3 user would write; prints env steps per second after the first rollout.
_SB3_PPO = """
import sys, time, tempfile, torch, gymnasium, perennial.envs
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
env, threads, rollouts, options = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
torch.set_num_threads(threads)
class Clock(BaseCallback):
    marks = []
    def _on_rollout_start(self): self.marks.append((time.perf_counter(), self.num_timesteps))
    def _on_step(self): return True
with tempfile.TemporaryDirectory() as logs:
    net = dict(net_arch=[256, 256], activation_fn=torch.nn.ReLU)
    model = PPO("MlpPolicy", env, policy_kwargs=net, tensorboard_log=logs, device="cpu", **options)
    model.learn(options["n_steps"] * rollouts, callback=Clock())
end = time.perf_counter()
begun, steps = Clock.marks[1]
print((model.num_timesteps - steps) / (end - begun))
"""


def _sb3(env: str, processes: int, threads: int) -> float:
    """Env steps per second of SB3's PPO, summed over processes that run side by side."""
    words = env, threads, _ROLLOUTS, repr(_PPO)
    return peer(_SB3_PPO, *words, processes=processes, threads=threads)


def _ours(seeds: int, plasticity: tuple[str, ...] = ()) -> tuple[float, float]:
    """Env steps per second over all seeds, and the share of time in metrics and recorder."""
    given = {"seeds": seeds, "steps": _ROLLOUTS * 2048, "plasticity": plasticity}
    rate, seconds = ours("ppo", {**_PPO, **given, "metrics_every": 4 * 2048})
    return rate, (seconds["metrics"] + seconds["record"]) / sum(seconds.values())


def _physics(lanes: int, threads: int) -> tuple[float, float]:
    """Env steps per second of batched lanes, and of raw `mj_step` on the same cores."""
    import threading

    import mujoco
    import numpy as np

    from perennial.envs.vector import make_vec

    args: dict[str, Any] = {"friction": (1.0, 1.0)}
    envs = make_vec("perennial/SlipperyAnt-v0", lanes, schedule_seeds=(0,), threads=threads, **args)
    raw = make_vec("perennial/SlipperyAnt-v0", threads, schedule_seeds=(0,), **args)
    envs.reset(seed=0)
    raw.reset(seed=0)
    rounds = 6000 // lanes
    actions = np.random.default_rng(0).uniform(-1, 1, (rounds, lanes, 8)).astype(np.float32)
    begun = time.perf_counter()
    for a in actions:
        envs.step(a)
    batched = rounds * lanes / (time.perf_counter() - begun)

    def spin(lane: int) -> None:
        model, data = raw.models[lane], raw.datas[lane]  # type: ignore[attr-defined]
        for a in actions.reshape(-1, 8)[: 6000 // threads]:
            data.ctrl[:] = a
            mujoco.mj_step(model, data, 5)

    spinning = [threading.Thread(target=spin, args=(lane,)) for lane in range(threads)]
    begun = time.perf_counter()
    for thread in spinning:
        thread.start()
    for thread in spinning:
        thread.join()
    bare = (6000 // threads) * threads / (time.perf_counter() - begun)
    envs.close()
    raw.close()
    return batched, bare


def bench_ppo(stream: TextIO) -> dict[str, Any]:
    """PPO on the ant: one seed, a seed per core, and the physics alone."""
    table, available = Table(), cores()
    shares = []
    for k in range(ROUNDS):
        print(f"round {k + 1} of {ROUNDS} ...", file=stream, flush=True)
        table.add("sb3 1 seed, Ant-v5", _sb3("Ant-v5", 1, available))
        rate, share = _ours(1)
        table.add("perennial 1 seed", rate)
        shares.append(share)
        table.add(f"sb3 {available} processes, Ant-v5", _sb3("Ant-v5", available, 1))
        rate, share = _ours(available)
        table.add(f"perennial {available} seeds", rate)
        shares.append(share)
        table.add(
            "sb3 1 seed, perennial/SlipperyAnt-v0", _sb3("perennial/SlipperyAnt-v0", 1, available)
        )
        table.add("perennial 1 seed, cbp", _ours(1, ("cbp",))[0])
        batched, bare = _physics(8, available)
        table.add("physics, 8 lanes", batched)
        table.add("physics, raw mj_step", bare)
    ratios = {
        "1 seed: perennial / sb3": table.ratio("perennial 1 seed", "sb3 1 seed, Ant-v5"),
        "1 seed: perennial / sb3 on our environment": table.ratio(
            "perennial 1 seed", "sb3 1 seed, perennial/SlipperyAnt-v0"
        ),
        f"{available} seeds: perennial / sb3 processes": table.ratio(
            f"perennial {available} seeds", f"sb3 {available} processes, Ant-v5"
        ),
        "1 seed: with cbp / without": table.ratio("perennial 1 seed, cbp", "perennial 1 seed"),
        "8 lanes / raw mj_step on all cores": table.ratio(
            "physics, 8 lanes", "physics, raw mj_step"
        ),
        "share of time in metrics and recorder": statistics.median(shares),
    }
    return table.show(stream, "env steps/s", ratios)
