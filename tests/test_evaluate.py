"""Playing what was trained: in which task, on what, and how it is seen."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial.agents.checkpoint import newest_checkpoint, read_checkpoint, write_checkpoint
from perennial.agents.config import UsageError
from perennial.agents.video import Video, check_video, draw_without_a_screen
from perennial.envs.vector import make_vec

ARGS: dict[str, dict[str, Any]] = {
    "perennial/SlipperyAnt-v0": {"change_every": 20},
    "perennial/AtariSwitch-v0": {"change_every": 20, "games": "Pong,Breakout"},
    "CartPole-v1": {},
}


@pytest.mark.parametrize("env", ARGS)
def test_the_task_of_a_saved_state_is_known_without_playing(env: str) -> None:
    envs: Any = make_vec(env, 4, schedule_seeds=(3, 5), **ARGS[env])
    envs.reset(seed=[0, 1, 2, 3])
    seen: list[int] = []
    for _ in range(60):
        if len(seen) % 7 == 0:
            saved = [(envs.get_state(block), envs.task_of(block)[0]) for block in (0, 1)]
        seen.append(envs.task_of(1)[0])
        envs.step(envs.action_space.sample())
        for block, (state, task) in enumerate(saved):
            now = envs.task_of(block)
            assert envs.task_in(block, state) == task
            assert envs.task_of(block) == now
    assert np.unique(seen).size == (1 if env == "CartPole-v1" else 6)
    envs.close()


def test_the_replay_is_left_on_the_disk(tmp_path: Path) -> None:
    frames, weights = np.zeros((5, 2**20), np.uint8), np.ones((2, 2**20), np.float32)
    tree = {"agent": {"net": weights, "replay": {"frames": frames, "written": 5}}, "replay": 7}
    folder = write_checkpoint(tmp_path, 100, tree)
    damaged = [p for p in folder.glob("*.npy") if p.stat().st_size < 6 * 2**20]
    assert len(damaged) == 1
    damaged[0].write_bytes(b"x")
    found = newest_checkpoint([tmp_path], without="agent/replay")
    assert found is not None
    (read,) = found[1]
    assert (read["agent"]["replay"], read["replay"]) == (None, 7)
    assert np.array_equal(read["agent"]["net"], weights)
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(tmp_path, 100)
    (folder / next(iter({*folder.glob("*.npy")} - {*damaged})).name).write_bytes(b"x")
    assert newest_checkpoint([tmp_path], without="agent/replay") is None


def test_a_film_that_was_not_finished_leaves_no_file(tmp_path: Path) -> None:
    kept = tmp_path / "kept.mp4"
    film = Video(kept, 30.0)
    film.close()  # nothing was filmed
    assert not kept.exists()
    film.add(np.zeros((480, 480, 3), np.uint8))
    film.drop()
    assert list(tmp_path.iterdir()) == []
    film.add(np.zeros((480, 480, 3), np.uint8))
    film.close()
    assert list(tmp_path.iterdir()) == [kept]


def test_what_a_film_needs_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else found(name)
    )
    with pytest.raises(UsageError, match=r"^--video needs .* 'perennial-rl\[video\]'$"):
        check_video(str(tmp_path / "x.mp4"))


def test_mujoco_draws_without_a_screen_but_not_against_the_users_will(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.delenv("DISPLAY", raising=False)
    draw_without_a_screen()
    assert os.environ["MUJOCO_GL"] == "glfw"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("DISPLAY", ":0")
    draw_without_a_screen()
    assert "MUJOCO_GL" not in os.environ
