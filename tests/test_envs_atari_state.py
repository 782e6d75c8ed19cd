"""The single changing Atari: state that goes on bit for bit, changes that leak nothing."""

import os
import resource
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import perennial.envs  # noqa: F401
from perennial.envs.atari import AtariLane, Emulators
from perennial.envs.atari_games import DIFFICULTIES, GAMES, MODES, Entry
from tests.states import through_files

ENV_ID = "perennial/AtariSwitch-v0"
# Games whose clones do not go on exactly in ale-py 0.12.1, or whose starts differ.
AWKWARD = ("Qbert", "Tetris", "TicTacToe3D", "YarsRevenge", "Amidar", "IceHockey")


def make(**kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make(ENV_ID, **kwargs)


def lane_of(game: str, stickiness: float = 0.0, frame_skip: int = 4) -> AtariLane:
    lane = AtariLane(Emulators(), frame_skip, stickiness, 108_000)
    lane.start(Entry(game, 0, None, None), picture())
    return lane


def picture() -> np.ndarray:
    return np.zeros((84, 84), np.uint8)


def check_game(game: str) -> None:
    """18 actions, the table's modes, starts and replays that know nothing of what was played."""
    first, other = lane_of(game), lane_of(game)
    assert tuple(first.ale.getAvailableModes()) == MODES[game]
    assert tuple(first.ale.getAvailableDifficulties()) == DIFFICULTIES[game]
    assert first.ale.cloneState().getCurrentMode() == MODES[game][0]
    entry, out, view = Entry(game, 0, None, None), picture(), picture()
    rng = np.random.default_rng(0)
    for action in [*range(18), *rng.integers(18, size=50).tolist()]:
        if other.step(action, out)[1]:
            other.start(entry, out)
    for _ in range(2):
        other.set_state(entry, through_files(first.get_state(), {}))
        for action in rng.integers(18, size=40).tolist():
            played = first.step(action, out)
            assert other.step(action, view) == played
            np.testing.assert_array_equal(out, view)
            np.testing.assert_array_equal(first.ale.getRAM(), other.ale.getRAM())
            if played[1]:
                break
        other.step(int(rng.integers(18)), view)
        first.start(entry, out)
        assert not first.applied


@pytest.mark.parametrize("game", [*AWKWARD, "Skiing", "VideoCube"])
def test_games(game: str) -> None:
    check_game(game)


@pytest.mark.slow
@pytest.mark.parametrize("game", GAMES)
def test_all_games(game: str) -> None:
    check_game(game)


def test_a_seed_repeats_an_episode_and_the_clock_goes_on() -> None:
    env = make(games="IceHockey", change_every=50)  # its starts differ

    def play(seed: int | None) -> list[bytes]:
        obs, _ = env.reset(seed=seed)
        return [obs.tobytes()] + [env.step(step % 18)[0].tobytes() for step in range(70)]

    first, going, again, other = play(1), play(None), play(1), play(2)
    assert first == again and first != going and first != other
    assert env.reset()[1]["task"] == 5
    assert env.reset(options={"restart": True})[1]["task"] == 0


@pytest.mark.parametrize("change", ["episode", "now"])
def test_state_goes_on_bit_for_bit(change: str) -> None:
    given = {"games": ["Qbert", "Breakout", "Tetris"], "change_every": 70, "change": change}
    actions = np.random.default_rng(3).integers(18, size=500)

    def walk(env: gym.Env[Any, Any], part: np.ndarray) -> Iterator[list[Any]]:
        for step, action in enumerate(part):
            row = list(env.step(action))
            if row[2] or row[3] or step % 60 == 59:
                row += env.reset()
            yield row

    unbroken, resumed = make(**given).unwrapped, make(**given).unwrapped
    unbroken.reset(seed=0)
    for _ in walk(unbroken, actions[:250]):
        pass
    for _ in walk(resumed, actions[: resumed.reset() and 30]):  # what it played does not matter
        pass
    resumed.set_state(through_files(unbroken.get_state(), {}))
    changes = set()
    for expected, ours in zip(
        walk(unbroken, actions[250:]), walk(resumed, actions[250:]), strict=True
    ):
        np.testing.assert_equal(ours, expected)
        changes.add(ours[4]["task"])
    assert len(changes) >= 3


def test_the_action_that_stickiness_holds_is_part_of_the_state() -> None:
    unbroken, resumed = (make(games="Pong", repeat_action_probability=0.9) for _ in range(2))
    unbroken.reset(seed=0)
    lane = unbroken.unwrapped._lane
    while lane.applied[-1:] != b"\x05":
        unbroken.step(5)
    resumed.unwrapped.set_state(through_files(unbroken.unwrapped.get_state(), {}))
    begun = len(lane.applied)
    for env in (unbroken, resumed.unwrapped):
        env.step(2)
    assert lane.applied[begun] == 5
    assert resumed.unwrapped._lane.applied == lane.applied


def test_states_of_something_else_are_refused() -> None:
    env = make(games=["Pong", "Freeway"]).unwrapped
    fresh = env.get_state()
    env.set_state(through_files(fresh, {}))
    env.reset(seed=0)
    env.step(3)
    state = through_files(env.get_state(), {})
    with pytest.raises(ValueError, match="plays Pong in task 0; here it is Freeway"):
        make(games="Freeway").unwrapped.set_state(state)
    with pytest.raises(ValueError, match=r"stack has shape \(4, 84, 84\), not \(2, 84, 84\)"):
        make(games="Pong", stack=2).unwrapped.set_state(state)
    state["lane"]["applied"] = state["lane"]["applied"][:-1]
    with pytest.raises(ValueError, match="the saved Pong ends elsewhere when replayed"):
        env.set_state(state)


def test_a_thousand_changes_leak_nothing() -> None:
    env = make(games=["Pong", "Freeway", "Breakout"], change_every=1)

    def change_often(times: int) -> tuple[int, int]:
        for _ in range(times):
            env.step(0)
            env.reset()
        files = len(os.listdir("/dev/fd"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, files  # KiB

    env.reset(seed=0)
    memory, files = change_often(100)
    memory_after, files_after = change_often(1000)
    assert env.reset()[1]["task"] == 1100
    assert memory_after - memory < 2048
    assert files_after == files
