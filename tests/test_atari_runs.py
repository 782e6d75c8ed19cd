"""Whole runs on changing Atari games: exact resume, raw returns by game, marks, memory."""

import csv
import io
import itertools
import os
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from perennial.agents import evaluate
from perennial.agents.checkpoint import checkpoints, newest_checkpoint, read_checkpoint
from perennial.agents.config import build_config
from perennial.agents.loop import train_group
from perennial.agents.run import Run
from tests.test_checkpoint import same
from tests.test_exactness import scalars

ATARI = {
    "env": "perennial/AtariSwitch-v0",
    "env_args": {"games": "Pong,Boxing,Breakout", "change_every": 250, "change": "now"},
    "num_envs": 2,
    "metrics_every": 500,
    "device": "cpu",
}
KINDS: dict[str, dict[str, Any]] = {
    "dqn": {"seeds": "5,", "steps": 1100, "learning_starts": 600, "train_freq": 25,
            "buffer_size": 500},
    "ppo": {"seeds": "3,5", "steps": 1000, "n_steps": 50, "batch_size": 50, "n_epochs": 1},
}  # fmt: skip
# After so many questions whether to stop: DQN asks between two updates, PPO between two rollouts.
STOPS = {"dqn": 18, "ppo": 6}


def go(run: Run, calls: int = 10**9) -> None:
    """Train all seeds in this process, until `stopping` has been asked `calls` times."""
    asked = iter(range(1, calls))
    config = run.config
    for folder in run.seed_dirs.values():
        folder.mkdir(parents=True, exist_ok=True)
    run.write()
    train_group(config, config.seeds, run.path, stopping=lambda: next(asked, None) is None)


def run_of(agent: str, path: Path) -> Run:
    config = build_config(agent, given={**ATARI, **KINDS[agent]})
    return Run(path, config, (config.seeds,), 1, "cpu")


@pytest.fixture(scope="module", params=KINDS)
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_of(request.param, tmp_path_factory.mktemp(request.param))
    go(run)
    return run


def test_stopped_amid_a_task_and_resumed_equals_unbroken(unbroken: Run, tmp_path: Path) -> None:
    run = run_of(unbroken.config.agent, tmp_path)
    go(run, STOPS[run.config.agent])
    (stopped,) = checkpoints(run.seed_dirs[5])[-1:]
    assert 400 < stopped < 1000
    go(run)
    for seed in run.config.seeds:
        one, other = unbroken.seed_dirs[seed], run.seed_dirs[seed]
        assert checkpoints(one)[-1] == checkpoints(other)[-1] >= 1000
        steps = checkpoints(one)[-1]
        assert same(read_checkpoint(one, steps), read_checkpoint(other, steps))
        assert (one / "episodes.csv").read_bytes() == (other / "episodes.csv").read_bytes()
        assert scalars(one) == scalars(other)


def test_raw_returns_by_game_are_those_of_the_episodes(unbroken: Run) -> None:
    games = ("Pong", "Boxing", "Breakout")
    for folder in unbroken.seed_dirs.values():
        shown = scalars(folder)
        tags = {tag for tag in shown if tag.startswith("game/")}
        assert tags <= {f"game/{game}/return" for game in games}
        assert len(tags) == 3 or unbroken.config.agent == "dqn"  # which has two points only
        with open(folder / "episodes.csv") as file:
            rows = [(int(r["env_steps"]), int(r["task"]), float(r["return"]))
                    for r in csv.DictReader(file)]  # fmt: skip
        assert max(task for _, task, _ in rows) >= 3  # the first game came round again
        for game in games:
            for step, value in shown.get(f"game/{game}/return", []):
                ended = [row for row in rows if row[0] <= step]
                latest = max(task for _, task, _ in ended)
                assert games[latest % 3] == game
                expected = np.mean([ret for _, task, ret in ended if task == latest])
                assert value == pytest.approx(expected)
        marked = [step for step, value in shown["task/change"] if value]
        tasks = dict(shown["task/index"])
        points = sorted(tasks)
        jumps = [b for a, b in itertools.pairwise(points) if tasks[a] != tasks[b]]
        assert [step for step in jumps if step not in marked] == []
        if unbroken.config.agent == "ppo":
            assert 3 <= len(marked) < len(points)


def test_the_trained_agent_plays_and_films_the_games_it_is_asked_for(
    unbroken: Run, tmp_path: Path
) -> None:
    policy = evaluate.Policy(unbroken, 5)
    found = newest_checkpoint([unbroken.seed_dirs[5]])
    assert found is not None and policy.env_steps == found[0]
    assert policy.task == policy.env_steps // 250
    pictures = np.zeros((3, 4, 84, 84), np.uint8)
    actions = policy.asked(policy.act(pictures))
    assert actions.shape == (3,) and set(actions.tolist()) <= set(range(18))
    args = {**unbroken.config.env_args, "max_frames": 400}
    short = Run(
        unbroken.path,
        build_config(
            unbroken.config.agent,
            given={**ATARI, **KINDS[unbroken.config.agent], "env_args": args},
        ),
        *((unbroken.config.seeds,), 1, "cpu"),  # type: ignore[arg-type]
    )
    results = evaluate.evaluate(short, episodes=2, task=4)
    assert [(r.seed, r.task, r.lengths) for r in results] == [
        (seed, 4, [100] * 2) for seed in unbroken.config.seeds
    ]
    short.write()
    stream = io.StringIO()
    film = tmp_path / "some folder" / "played.mp4"
    film.parent.mkdir()
    assert evaluate.main(short.path, 1, 2, stream, str(film)) == 0
    assert "task 2, Breakout" in stream.getvalue() and str(film) in stream.getvalue()
    pictures_shown = imageio_ffmpeg.read_frames(str(film))
    meta = next(pictures_shown)
    assert (meta["size"], meta["fps"]) == ((320, 420), 15.0)
    assert len(list(pictures_shown)) == 100 * len(unbroken.config.seeds)
    assert list(film.parent.iterdir()) == [film]


@pytest.mark.slow
def test_a_run_of_a_thousand_changes_keeps_its_memory(tmp_path: Path) -> None:
    def held() -> tuple[float, int]:
        """Megabytes in memory, and open files."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/dev/fd"))

    seen: dict[int, tuple[float, int]] = {}
    args = {"games": "Pong,Boxing,Breakout", "change_every": 4, "change": "now"}
    given = {**ATARI, "env_args": args, "num_envs": 1, "steps": 4400, "n_steps": 100,
             "batch_size": 100, "n_epochs": 1, "checkpoint_every": 1000}  # fmt: skip
    config = build_config("ppo", given=given)
    run = Run(tmp_path, config, (config.seeds,), 1, "cpu")
    run.seed_dirs[0].mkdir()
    train_group(
        config, (0,), run.path, report=lambda message: seen.update({message["env_steps"]: held()})
    )
    rows = (run.seed_dirs[0] / "episodes.csv").read_text().splitlines()
    assert len(rows) - 1 == 1100
    (before, files), (after, files_after) = seen[1200], seen[4400]
    assert after - before < 8
    assert files_after == files
