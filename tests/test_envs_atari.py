"""The single changing Atari: Gymnasium's pictures, stickiness, the schedule, exact state."""

import inspect
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
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
from perennial.envs import specs
from perennial.envs.atari import AtariLane, Emulators
from perennial.envs.atari_games import (
    DIFFICULTIES,
    GAMES,
    MODES,
    PARAM_NAMES,
    Entry,
    Rounds,
    rom_name,
)
from tests.states import through_files

ENV_ID = "perennial/AtariSwitch-v0"
# Games whose clones do not go on exactly in ale-py 0.12.1, or whose starts differ, and plain ones.
AWKWARD = ("Qbert", "Tetris", "TicTacToe3D", "YarsRevenge", "Amidar", "IceHockey")


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


def test_the_table_holds_gymnasiums_games() -> None:
    gym.register_envs(ale_py)
    theirs = {
        spec.id.removeprefix("ALE/").removesuffix("-v5"): spec.kwargs["game"]
        for spec in gym.registry.values()
        if spec.id.startswith("ALE/") and spec.id.endswith("-v5")
    }
    assert {game: rom_name(game) for game in GAMES} == theirs
    assert all(ale_py.roms.get_rom_path(rom) for rom in theirs.values())


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


def test_a_seed_repeats_an_episode_and_the_clock_goes_on() -> None:
    env = make(games="IceHockey", change_every=50)  # its starts differ

    def play(seed: int | None) -> list[bytes]:
        obs, _ = env.reset(seed=seed)
        return [obs.tobytes()] + [env.step(step % 18)[0].tobytes() for step in range(70)]

    first, going, again, other = play(1), play(None), play(1), play(2)
    assert first == again and first != going and first != other
    assert env.reset()[1]["task"] == 5
    assert env.reset(options={"restart": True})[1]["task"] == 0


def test_a_task_can_be_held() -> None:
    env = make(games=["Pong", "Freeway"], task=3, change_every=2)
    for _ in range(3):
        _, info = env.reset()
        assert (info["task"], info["game"]) == (3, "Freeway")
        for _ in range(5):
            env.step(0)


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


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"games": "Pnog"}, "games=Pnog: did you mean Pong?"),
        ({"games": ""}, "games must be names such as Adventure, AirRaid, Alien; got none"),
        ({"games": "Pong,Krull", "modes": "1"}, "modes=1: Krull has modes 0"),
        ({"games": "Pong", "difficulties": "0,4"}, "difficulties=4: Pong has difficulties 0, 1,"),
        ({"modes": "1.5"}, "modes must be whole numbers of at least 0; got 1.5"),
        ({"change_every": "0"}, "change_every must be a whole number of at least 1; got 0"),
        ({"cycles": "0"}, "cycles must be a whole number of at least 1"),
        ({"order": "shufled"}, "did you mean shuffled?"),
        ({"change": "soon"}, "change=soon: "),
        ({"repeat_action_probability": "1.5"}, "must be a number from 0 to 1; got 1.5"),
        ({"frame_skip": "0"}, "frame_skip must be a whole number of at least 1"),
        ({"stack": "0"}, "stack must be a whole number of at least 1"),
        ({"max_frames": "none"}, "max_frames must be a whole number of at least 1; got none"),
        ({"sticky": "0"}, "takes no sticky"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        specs.check_args(ENV_ID, args)
    assert "\n" not in str(caught.value)


def test_names_are_read_in_any_case() -> None:
    given = {"games": "pong,ms_pacman, TICTACTOE3D", "modes": "0", "change_every": "5e6"}
    wanted = {
        "games": ("Pong", "MsPacman", "TicTacToe3D"),
        "modes": (0,),
        "change_every": 5_000_000,
    }
    assert specs.check_args(ENV_ID, given) == wanted
    assert specs.check_args(ENV_ID, {"games": ["Pong"]}) == {"games": ("Pong",)}


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = specs.importlib.util.find_spec
    monkeypatch.setattr(
        specs.importlib.util, "find_spec", lambda name: None if name == "ale_py" else find(name)
    )
    for build in (lambda: specs.check_env(ENV_ID), make, lambda: gym.make_vec(ENV_ID)):
        with pytest.raises(ValueError, match=r"needs ale_py: pip install 'perennial-rl\[atari\]'"):
            build()


def test_the_table_of_parameters_matches_the_constructors() -> None:
    from perennial.envs.atari_switch import AtariSwitchEnv
    from perennial.envs.atari_switch_vector import AtariSwitchVectorEnv

    told = specs.ENVS[ENV_ID].defaults
    own = {"num_envs", "threads", "schedule_seed", "render_mode"}
    for cls in (AtariSwitchEnv, AtariSwitchVectorEnv):
        params = inspect.signature(cls).parameters
        taken = {name: param.default for name, param in params.items() if name not in own}
        assert taken == told


def test_checking_imports_no_emulator() -> None:
    code = (
        "import sys, perennial.envs.atari_switch_vector; from perennial.envs import specs\n"
        f"specs.check_env({ENV_ID!r}); specs.check_args({ENV_ID!r}, {{'games': 'Pong'}})\n"
        "print(sorted({'torch', 'ale_py', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_renders_the_games_colours() -> None:
    env = make(games="Pong", render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (210, 160, 3) and frame.dtype == np.uint8 and frame.std() > 5
    with pytest.raises(ValueError, match="render_mode=human: choose rgb_array"):
        perennial.envs.make_vec(ENV_ID, 1, schedule_seeds=[0], render_mode="human")
