"""SAC from the command line on two threads: killed and stopped, resumed to the same bits."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np

from perennial.agents.checkpoint import checkpoints, read_checkpoint
from tests.test_checkpoint import same
from tests.test_exactness import command, finish, scalars

STEPS, SEEDS = 4000, (0,)
OPTIONS = (
    "--env-args change_every=900 max_episode_steps=150 --num-envs 2 --batch-size 32 --train-freq 4 "
    "--net-arch 32,32 --learning-starts 200 --buffer-size 3000 --n-step 2 --at-change per-task "
    "--checkpoint-every 1000 --metrics-every 1000 --seeds 1 --plasticity cbp:rate=0.01,maturity=20 "
    f"reset:every=350 --value-loss hl-gauss:low=-50,high=50 --steps {STEPS} --device cpu"
).split()


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(folder: Path, process: subprocess.Popen, steps: int) -> None:
    """Until every seed has a checkpoint at `steps` or later."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if all((checkpoints(folder / f"seed-{seed}") or [0])[-1] >= steps for seed in SEEDS):
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint at {steps}: {process.communicate()[0]}")


def test_killed_and_stopped_and_resumed_equals_unbroken(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish(start("train", "sac", *OPTIONS, "--run-dir", str(unbroken)))
    process = start("train", "sac", *OPTIONS, "--run-dir", str(broken))
    wait_for(broken, process, 1000)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = start("resume", str(broken))
    wait_for(broken, process, 2000)
    os.killpg(process.pid, signal.SIGTERM)
    out = finish(process, 143)
    assert "Traceback" not in out and f"perennial resume {broken}" in out
    assert 2000 <= checkpoints(broken / "seed-0")[-1] < STEPS
    finish(start("resume", str(broken)))
    for seed in SEEDS:
        one, other = (folder / f"seed-{seed}" for folder in (unbroken, broken))
        end = read_checkpoint(one, STEPS)
        assert same(end, read_checkpoint(other, STEPS))
        assert (one / "episodes.csv").read_bytes() == (other / "episodes.csv").read_bytes()
        shown = scalars(one)
        assert shown == scalars(other)
        assert shown["train/critic_loss"] and shown["intervention/cbp/units_reset"][-1][1] > 10
        replay = end["agent"]["replay"]
        assert replay["written"] == STEPS // 2 and len(replay["rewards"]) == 3000 // 2 + 1
        assert replay["seen"]["finals"] is not None and len(replay["spans"]) > 2
        assert np.isfinite(replay["rewards"]).all()
