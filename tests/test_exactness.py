"""Same command, same bits; killed and resumed, same bits; a seed does not feel its company."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perennial.agents.checkpoint import checkpoints, read_checkpoint
from perennial.agents.config import build_config
from perennial.agents.episodes import Episodes
from perennial.agents.ppo import PPO, Batch
from perennial.agents.streams import environment_seeds
from perennial.envs.vector import make_vec
from tests.test_checkpoint import same

STEPS = 10_240
OPTIONS = (
    "--env-args change_every=1500 max_episode_steps=200 --n-steps 256 --num-envs 2 --batch-size 64 "
    "--n-epochs 4 --net-arch 32,32 --checkpoint-every 1024 --metrics-every 1024 --norm-obs "
    "--norm-reward --seeds 2 --plasticity cbp:rate=0.01,maturity=20 l2:strength=1e-4 "
    f"--steps {STEPS} --device cpu"
).split()


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "perennial.agents", *words]


def train(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command("train", "ppo", *OPTIONS, "--run-dir", str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == status, out
    return out


def scalars(seed_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, without wall clock times."""
    events = EventAccumulator(str(seed_dir), size_guidance={"scalars": 0}).Reload()
    tags = [t for t in events.Tags()["scalars"] if not t.startswith("time/")]
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags}


def assert_same_run(a: Path, b: Path) -> None:
    for seed in (0, 1):
        one, other = a / f"seed-{seed}", b / f"seed-{seed}"
        assert checkpoints(one)[-1] == checkpoints(other)[-1] == STEPS
        assert same(read_checkpoint(one, STEPS), read_checkpoint(other, STEPS))
        assert (one / "episodes.csv").read_bytes() == (other / "episodes.csv").read_bytes()
        shown, expected = scalars(other), scalars(one)
        assert shown.keys() == expected.keys()
        for tag, values in expected.items():
            assert shown[tag] == values or np.isnan([v for _, v in values]).any(), tag


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    finish(train(folder))
    return folder


def test_a_run_learns_and_records(unbroken):
    rows = (unbroken / "seed-0" / "episodes.csv").read_text().splitlines()
    assert rows[0] == "env_steps,task,return,length" and len(rows) > 20
    ends = [int(r.split(",")[0]) for r in rows[1:]]
    assert ends == sorted(ends)
    # A lane enters a task at its own next episode, so two lanes may be in two tasks.
    tasks = [int(r.split(",")[1]) for r in rows[1:]]
    assert set(tasks) == set(range(7)) and tasks[0] == 0 and tasks[-1] == 6
    shown = scalars(unbroken / "seed-0")
    for tag in ("rollout/ep_rew_mean", "task/index", "task/friction", "train/value_loss",
                "plasticity/policy/dormant_fraction", "intervention/cbp/units_reset"):  # fmt: skip
        assert shown[tag], tag
    assert shown["intervention/cbp/units_reset"][-1][1] > 10
    steps = [s for s, _ in shown["rollout/ep_rew_mean"]]
    assert steps == sorted(set(steps))


def test_same_command_twice_gives_the_same_bits(unbroken, tmp_path):
    finish(train(tmp_path / "run"))
    assert_same_run(unbroken, tmp_path / "run")


def wait_for_progress(folder: Path, process: subprocess.Popen, wanted: int) -> None:
    """Until `wanted` checkpoints of seed 0 were written."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        steps = checkpoints(folder / "seed-0")
        if wanted == 0 and (folder / "seed-0" / "episodes.csv").exists():
            return
        if steps and steps[-1] >= wanted * 1024 > 0:
            return
        time.sleep(0.01)


def survivors(group: int) -> list[int]:
    """Processes left of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (
                    os.getpgid(int(entry.name)) == group
                    and "Z" not in ((entry / "stat").read_text().rpartition(")")[2].split()[0])
                ):
                    found.append(int(entry.name))
            except (ProcessLookupError, FileNotFoundError):
                continue
    return found


@pytest.mark.parametrize("whom", ["parent", "all"])
def test_killed_and_resumed_equals_unbroken(unbroken, tmp_path, whom):
    """kill -9 before the first checkpoint and at a random later moment, of the parent or of all."""
    folder, rng = tmp_path / "run", random.Random(whom)
    process = train(folder)
    for wanted in (0, rng.randrange(2, 8)):
        wait_for_progress(folder, process, wanted)
        time.sleep(rng.random() * 0.3)
        if whom == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while survivors(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not survivors(process.pid), "a worker outlived its parent"
        process.communicate()
        process = subprocess.Popen(
            command("resume", str(folder)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finish(process)
    assert_same_run(unbroken, folder)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_resumed_equals_unbroken(unbroken, tmp_path, number, status):
    folder = tmp_path / "run"
    process = train(folder)
    wait_for_progress(folder, process, 2)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does it: to all of them
    out = finish(process, status)
    assert f"perennial resume {folder}" in out and "Traceback" not in out
    assert 0 < checkpoints(folder / "seed-0")[-1] < STEPS
    assert subprocess.run(command("resume", str(folder)), capture_output=True).returncode == 0
    assert_same_run(unbroken, folder)


def agent_of(seeds, **options) -> tuple[PPO, object, Episodes]:
    config = build_config(
        "ppo",
        given={"n_steps": 64, "batch_size": 32, "net_arch": (32, 32), "steps": 1000, "num_envs": 2,
               "plasticity": ["cbp:rate=0.02,maturity=5"], "env_args": {"change_every": 100},
               "seeds": seeds, **options},
    )  # fmt: skip
    envs = make_vec(config.env, len(seeds) * 2, schedule_seeds=seeds, **config.env_args)
    space = envs.single_observation_space, envs.single_action_space
    agent = PPO(config, *space, tuple(seeds), dtype=torch.float64)
    agent.start(envs.reset(seed=[lane for s in seeds for lane in environment_seeds(s, 2)])[0])
    return agent, envs, Episodes(len(seeds), 2)


def test_a_seed_alone_equals_the_seed_among_four():
    seeds = (5, 1, 7, 3)
    together, envs4, episodes4 = agent_of(seeds)
    alone, envs1, episodes1 = agent_of((7,))
    for a, b in zip(alone.net.parameters(), together.net.parameters(), strict=True):
        assert torch.equal(a[0], b[2])
    assert np.array_equal(alone.latest[0], together.latest[2])  # environments after reset
    assert same(envs1.get_state(0), envs4.get_state(2))
    assert envs1.task_of(0) == envs4.task_of(2) != envs4.task_of(1)
    alone.collect(envs1, episodes1)
    together.collect(envs4, episodes4)
    assert alone.action_noise.state(0) == together.action_noise.state(2)
    # Ten updates on one stored rollout: the one of the seed alone.
    rollout = [x.flatten(1, 2) for x in (alone.observations, alone.actions, alone.outputs)]
    log_prob = alone.net.distribution.log_prob(rollout[2], rollout[1])
    values = alone.values(rollout[0])
    advantages = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)).double()
    data = [*rollout[:2], log_prob, values, advantages, advantages + values]
    for _ in range(10):
        orders = [agent.minibatch_order.permutations(128, 10) for agent in (alone, together)]
        assert np.array_equal(orders[0][0], orders[1][2])
        alone.learn(Batch(*data), torch.from_numpy(orders[0]))
        four = [x.expand(4, *x.shape[1:]).clone() for x in data]
        together.learn(Batch(*four), torch.from_numpy(orders[1]))
    assert alone.handle.counts()["cbp"][0] == together.handle.counts()["cbp"][2] > 5
    for (name, a), b in zip(alone.net.named_parameters(), together.net.parameters(), strict=True):
        assert (a[0] - b[2]).abs().max() < 1e-9, name
        assert (a[0] - b[1]).abs().max() > 1e-3, name
