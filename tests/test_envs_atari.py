"""The single changing Atari: Gymnasium's pictures, stickiness, the schedule."""

import warnings
from itertools import pairwise
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import perennial.envs
from perennial.envs.atari import AtariLane, Emulators
from perennial.envs.atari_games import GAMES, MODES, PARAM_NAMES, Entry, Rounds

ENV_ID = "perennial/AtariSwitch-v0"


def make(**kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make(ENV_ID, **kwargs)


def lane_of(game: str, stickiness: float = 0.0, frame_skip: int = 4) -> AtariLane:
    lane = AtariLane(Emulators(), frame_skip, stickiness, 108_000)
    lane.start(Entry(game, 0, None, None), picture())
    return lane


def picture() -> np.ndarray:
    return np.zeros((84, 84), np.uint8)


def test_gymnasium_and_sb3_checkers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(games="Breakout", render_mode="rgb_array")
        gymnasium_check_env(env.unwrapped)
        sb3_check_env(make(games="Breakout", render_mode="rgb_array"))


@pytest.mark.parametrize(
    ("game", "given"),
    [("Breakout", {}), ("SpaceInvaders", {"mode": 3, "difficulty": 1}), ("AirRaid", {})],
)
def test_equals_gymnasiums_preprocessing_bit_for_bit(game: str, given: dict[str, int]) -> None:
    """Over episodes, but for a last picture within a skip, where theirs pools older frames."""
    gym.register_envs(ale_py)
    plain = gym.make(
        f"ALE/{game}-v5",
        frameskip=1,
        repeat_action_probability=0.0,
        full_action_space=True,
        **given,
    )
    reference = FrameStackObservation(AtariPreprocessing(plain, noop_max=0), 4, padding_type="zero")
    ours = make(
        games=game,
        modes=given.get("mode"),
        difficulties=given.get("difficulty"),
        repeat_action_probability=0,
    )
    rng = np.random.default_rng(1)
    (expected, _), (obs, info) = reference.reset(seed=0), ours.reset(seed=0)
    wanted = {"game": 0.0, "mode": MODES[game][0], "difficulty": 0, **given}
    assert info["task_params"] == wanted and set(wanted) == set(PARAM_NAMES)
    endings, score = 0, 0.0
    for _ in range(400):
        np.testing.assert_array_equal(obs, expected, strict=True)
        action = int(rng.integers(18))
        expected, reward, terminated, truncated, theirs = reference.step(action)
        obs, points, over, cut, info = ours.step(action)
        assert (points, over, cut, info["lives"]) == (
            reward,
            terminated,
            truncated,
            theirs["lives"],
        )
        assert info["frames"] == theirs["episode_frame_number"]
        score += points
        if over:
            if info["frames"] % 4 == 0:
                np.testing.assert_array_equal(obs, expected)
            else:
                np.testing.assert_array_equal(obs[:3], expected[:3])
            (expected, _), (obs, info) = reference.reset(), ours.reset()
            endings += 1
    assert score > 0
    assert endings > 0 or game != "Breakout"
    assert score % 25 == 0 or game != "AirRaid"  # points, not their signs


def test_frames_repeat_the_last_action_a_quarter_of_the_time() -> None:
    lane = lane_of("Pong", stickiness=0.25)
    lane.seed(np.random.default_rng(0))
    out, repeats, trials, last = picture(), 0, 0, 0
    for step in range(4000):
        action = 1 + step % 17  # never what is held
        begun = lane.frames
        _, over, _ = lane.step(action, out)
        for applied in lane.applied[begun:]:
            assert applied in (last, action)
            if last != action:
                trials += 1
                repeats += applied == last
            last = applied
        if over:
            lane.start(Entry("Pong", 0, None, None), out)
            last = 0
    assert trials > 5000
    assert abs(repeats / trials - 0.25) < 0.01


def test_stickiness_may_be_off_or_total() -> None:
    for stickiness, applied in ((0.0, {5}), (1.0, {0})):
        env = make(games="Pong", repeat_action_probability=stickiness)
        env.reset(seed=0)
        for _ in range(5):
            env.step(5)
        assert set(env.unwrapped._lane.applied) == applied


def test_every_game_has_the_joysticks_18_actions() -> None:
    env = make(games=GAMES)
    assert env.action_space == gym.spaces.Discrete(18)
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    env.reset(seed=0)
    for action in (-1, 18, 1.5):
        with pytest.raises(ValueError, match="an action is a whole number from 0 to 17"):
            env.unwrapped.step(action)


def test_changes_come_on_schedule_and_never_within_an_episode() -> None:
    games = ["Pong", "Breakout", "Freeway"]
    env = make(games=games, change_every=25, cycles=2)
    rng = np.random.default_rng(2)
    _, info = env.reset(seed=0)
    tasks = [0]
    for step in range(1, 201):
        here = info["task"], info["game"]
        obs, _, terminated, truncated, info = env.step(int(rng.integers(18)))
        assert (info["task"], info["game"]) == here
        if terminated or truncated or step % 35 == 0:
            obs, info = env.reset()
            assert info["task"] == min(step // 25, 5)  # two cycles, then the last one stays
            assert info["game"] == games[info["task"] % 3]
            assert info["task_params"] == {"game": info["task"] % 3, "mode": 0, "difficulty": 0}
            assert not obs[:3].any() and obs[3].any()  # the frame stack is dropped
            tasks.append(info["task"])
    assert sorted(set(tasks)) == [0, 1, 2, 4, 5]


def test_change_now_truncates_at_the_very_step() -> None:
    env = make(games="Pong,Freeway".split(","), change_every=20, change="now")
    _, info = env.reset(seed=0)
    for step in range(1, 61):
        assert info["game"] == ["Pong", "Freeway"][(step - 1) // 20 % 2]
        obs, _, terminated, truncated, told = env.step(0)
        assert (terminated, truncated) == (False, step % 20 == 0)
        assert told["task"] == info["task"]
        if truncated:
            obs, info = env.reset()
            assert info["task"] == step // 20
            assert not obs[:3].any()


def test_a_due_task_that_changes_nothing_cuts_no_episode() -> None:
    env = make(games="Pong", change_every=5, change="now")
    env.reset(seed=0)
    assert not any(env.step(0)[3] for _ in range(20))
    assert env.reset()[1]["task"] == 4


def test_modes_and_difficulties_are_tasks() -> None:
    env = make(games=["Pong", "Alien"], modes=[0, 1], difficulties=[0, 3], change_every=1)
    seen = []
    env.reset(seed=0)
    for _ in range(9):
        _, info = env.reset()
        numbers = env.unwrapped.ale.cloneState()
        seen.append((info["game"], info["task_params"]["mode"], info["task_params"]["difficulty"]))
        assert (numbers.getCurrentMode(), numbers.getDifficulty()) == seen[-1][1:]
        env.step(0)
    pairs = [(0, 0), (0, 3), (1, 0), (1, 3)]
    assert seen[:8] == [(game, *pair) for game in ("Pong", "Alien") for pair in pairs]
    assert seen[8] == seen[0]


def test_shuffled_cycles_hold_every_game_once_and_none_twice_in_a_row() -> None:
    orders = set()
    for seed in range(20):
        rounds = Rounds(5, None, True)
        tour = [rounds.value(task, 0, seed) for task in range(50)]
        for cycle in range(10):
            assert sorted(tour[5 * cycle : 5 * cycle + 5]) == [0, 1, 2, 3, 4]
            orders.add(tuple(tour[5 * cycle : 5 * cycle + 5]))
        assert all(a != b for a, b in pairwise(tour))
        assert tour == [rounds.value(task, 0, seed) for task in range(50)]
        turns = [Rounds(2, None, True).value(task, 0, seed) for task in range(6)]
        assert turns in ([0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0])
    assert len(orders) > 90


@pytest.mark.parametrize(("skip", "ends"), [(4, 11), (1, 42), (3, 14)])
def test_max_frames_truncates(skip: int, ends: int) -> None:
    env = make(games="Pong", max_frames=42, frame_skip=skip)
    for _ in range(2):
        env.reset()
        for step in range(1, ends + 1):
            _, _, terminated, truncated, info = env.step(0)
            assert (terminated, truncated) == (False, step == ends)
        assert info["frames"] == 42


def test_a_task_can_be_held() -> None:
    env = make(games=["Pong", "Freeway"], task=3, change_every=2)
    for _ in range(3):
        _, info = env.reset()
        assert (info["task"], info["game"]) == (3, "Freeway")
        for _ in range(5):
            env.step(0)


def test_renders_the_games_colours() -> None:
    env = make(games="Pong", render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (210, 160, 3) and frame.dtype == np.uint8 and frame.std() > 5
    with pytest.raises(ValueError, match="render_mode=human: choose rgb_array"):
        perennial.envs.make_vec(ENV_ID, 1, schedule_seeds=[0], render_mode="human")
