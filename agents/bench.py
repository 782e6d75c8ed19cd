"""Throughput side by side with Stable-Baselines3: `perennial bench ppo`.

Machines are shared and noisy, so what counts are ratios taken in one run: peers and ours alternate,
each in fresh processes, with the same hyper-parameters and logging on; the median of the rounds is
shown.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from perennial.agents.bench_plasticity import bench_plasticity
from perennial.agents.config import UsageError, build_config
from perennial.agents.options import nearest
from perennial.agents.run import Run, Worker, cores, grouping

ROUNDS = 3
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


@dataclass
class Table:
    """Measured rows: name -> one figure per round."""

    rows: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Add one round's figure."""
        self.rows.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """Median over the rounds."""
        return statistics.median(self.rows[name])

    def ratio(self, above: str, below: str) -> float:
        """Median over the rounds of the ratio taken within each round."""
        return statistics.median(
            a / b for a, b in zip(self.rows[above], self.rows[below], strict=True)
        )


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _sb3(env: str, processes: int, threads: int) -> float:
    """Env steps per second of SB3's PPO, summed over processes that run side by side."""
    command = [sys.executable, "-c", _SB3_PPO, env, str(threads), str(_ROLLOUTS), repr(_PPO)]
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(threads),
        )
        for _ in range(processes)
    ]
    total = 0.0
    for process in running:
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the SB3 run failed: {err.strip().splitlines()[-1]}")
        total += float(out.strip().splitlines()[-1])
    return total


def _ours(seeds: int, plasticity: tuple[str, ...] = ()) -> tuple[float, float]:
    """Env steps per second over all seeds, and the share of time in metrics and recorder."""
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(
            "ppo",
            given={
                **_PPO,
                "seeds": seeds,
                "steps": _ROLLOUTS * 2048,
                "run_dir": folder,
                "plasticity": plasticity,
                "metrics_every": 4 * 2048,
                # SB3 writes none either; a run's default is one in 20 to 250k steps.
                "checkpoint_every": _ROLLOUTS * 2048,
                "device": "cpu",
            },
        )
        groups, threads = grouping(config.seeds, "cpu")
        run = Run(Path(folder), config, groups, threads, "cpu")
        inbox: queue.SimpleQueue[tuple[Worker, Any]] = queue.SimpleQueue()
        workers = {Worker(run, group, inbox) for group in groups}
        marks: dict[int, list[tuple[float, int]]] = {}
        seconds: dict[str, float] = {}
        while workers:
            worker, message = inbox.get()
            if message is None:
                workers.discard(worker)
            elif "error" in message:
                raise RuntimeError(message["error"])
            elif "seconds" in message:
                for part, value in message["seconds"].items():
                    seconds[part] = seconds.get(part, 0.0) + value
            elif "env_steps" in message:
                marks.setdefault(message["seed"], []).append(
                    (time.perf_counter(), message["env_steps"])
                )
        rate = sum((m[-1][1] - m[0][1]) / (m[-1][0] - m[0][0]) for m in marks.values())
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
    print("\nenv steps/s (median of rounds)", file=stream)
    for name in table.rows:
        print(f"  {name:44s} {table.median(name):8.0f}", file=stream)
    print("\nratios (median of the rounds' ratios)", file=stream)
    for name, value in ratios.items():
        print(f"  {name:44s} {value:8.3f}", file=stream)
    return {"env_steps_per_second": table.rows, "ratios": ratios}


BENCHES: dict[str, Callable[[TextIO], dict[str, Any]]] = {
    "ppo": bench_ppo,
    "plasticity": bench_plasticity,
}


def main(names: list[str], json_file: str | None, stream: TextIO) -> int:
    """`perennial bench`: run the named benchmarks, all without a name; keep the figures."""
    for name in names:
        if name not in BENCHES:
            raise UsageError(f"unknown benchmark {name!r}{nearest(name, BENCHES)}")
    if json_file is not None and not Path(json_file).resolve().parent.is_dir():
        raise UsageError(f"--json {json_file}: its folder does not exist")
    results = {name: BENCHES[name](stream) for name in names or BENCHES}
    if json_file is not None:
        Path(json_file).write_text(json.dumps(results, indent=1) + "\n")
    return 0
