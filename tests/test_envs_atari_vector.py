"""Many changing consoles: lanes equal single environments, state goes on bit for bit."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

import perennial.envs  # noqa: F401
from perennial.envs import atari_bank, make_vec
from tests.states import through_files

ENV_ID = "perennial/AtariSwitch-v0"
STEPS = 120
GAMES = ["Breakout", "Qbert", "YarsRevenge"]


def actions(num: int, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(18, size=(steps, num))


def rollout(envs: Any, given: np.ndarray) -> Iterator[list[Any]]:
    """Everything that a step returns, flattened to lists of arrays."""
    for action in given:
        obs, rewards, terminated, truncated, infos = envs.step(action)
        row = [obs, rewards, terminated, truncated]
        final = infos.pop("final_info", {"task_params": {}})
        row += [row for row in infos.pop("final_obs", []) if row is not None]
        for told in (infos, final):
            row += [*told.pop("task_params").values(), *told.values()]
        yield row


def assert_same(one: Any, other: Any) -> None:
    count = 0
    for ours, theirs in zip(one, other, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
        count += 1
    assert count > 0


@pytest.mark.parametrize(("lanes_per_seed", "threads"), [(1, 1), (2, 3)])
def test_lanes_equal_single_environments(lanes_per_seed: int, threads: int) -> None:
    num = 2 * lanes_per_seed
    options: dict[str, Any] = {
        "games": GAMES,
        "change_every": 40,
        "max_frames": 140,
        "order": "shuffled",
    }
    envs = gym.make_vec(ENV_ID, num_envs=num, schedule_seed=[4, 9], threads=threads, **options)
    singles = [gym.make(ENV_ID, schedule_seed=s, **options) for s in np.repeat([4, 9], num // 2)]
    obs, infos = envs.reset(seed=11)
    for lane, single in enumerate(singles):
        np.testing.assert_array_equal(obs[lane], single.reset(seed=11 + lane)[0], strict=True)
    games = set()
    for step, action in enumerate(actions(num)):
        obs, rewards, terminated, truncated, infos = envs.step(action)
        for lane, single in enumerate(singles):
            # A lane alone counts its own steps; beside others its clock counts theirs too.
            single.unwrapped._tour.clock.env_steps = (step + 1) * lanes_per_seed - 1
            row, reward, over, cut, info = single.step(action[lane])
            assert (rewards[lane], terminated[lane], truncated[lane]) == (reward, over, cut)
            if over or cut:
                np.testing.assert_array_equal(infos["final_obs"][lane], row, strict=True)
                for name in ("task", "game", "lives", "frames"):
                    assert infos["final_info"][name][lane] == info[name]
                row, info = single.reset()
            np.testing.assert_array_equal(obs[lane], row, strict=True)
            for name in ("task", "game", "lives", "frames"):
                assert infos[name][lane] == info[name]
            params = {name: values[lane] for name, values in infos["task_params"].items()}
            assert params == info["task_params"]
            games.add(info["game"])
        over = terminated | truncated
        assert ("final_obs" in infos) == ("final_info" in infos) == over.any()
    assert games == set(GAMES)
    envs.close()


@pytest.mark.parametrize("change", ["episode", "now"])
def test_state_goes_on_bit_for_bit(change: str) -> None:
    options: dict[str, Any] = {
        "games": GAMES,
        "change_every": 110,
        "max_frames": 150,
        "change": change,
    }
    given = actions(6, 2 * STEPS)
    unbroken = make_vec(ENV_ID, 6, schedule_seeds=[1, 2], **options)
    unbroken.reset(seed=5)
    for _ in rollout(unbroken, given[:STEPS]):
        pass
    arrays: dict[str, np.ndarray] = {}
    states = [through_files(unbroken.get_state(block), arrays) for block in (0, 1)]
    assert all(state["exact"] for state in states)
    resumed = make_vec(ENV_ID, 6, schedule_seeds=[1, 2], threads=2, **options)
    for block in (1, 0):
        resumed.set_state(block, states[block])
    assert [resumed.task_of(b) for b in (0, 1)] == [unbroken.task_of(b) for b in (0, 1)]
    assert_same(rollout(unbroken, given[STEPS:]), rollout(resumed, given[STEPS:]))
    assert unbroken.task_of(0)[0] == 2 * STEPS * 3 // 110
    resumed.close()


def test_one_seed_goes_on_alone() -> None:
    options: dict[str, Any] = {"games": ["Pong", "Tetris"], "change_every": 70, "max_frames": 120}
    given = actions(4, 2 * STEPS)
    both = make_vec(ENV_ID, 4, schedule_seeds=[1, 2], **options)
    both.reset(seed=[3, 4, 5, 6])
    for _ in rollout(both, given[:STEPS]):
        pass
    alone = make_vec(ENV_ID, 2, schedule_seeds=[2], **options)
    alone.set_state(0, both.get_state(1))
    for action in given[STEPS:]:
        expected, ours = both.step(action), alone.step(action[2:])
        for a, b in zip(expected[:4], ours[:4], strict=True):
            np.testing.assert_array_equal(a[2:], b)
        np.testing.assert_array_equal(expected[4]["game"][2:], ours[4]["game"])
    assert both.task_of(1) == alone.task_of(0) and alone.task_of(0)[0] > 3


def test_the_clock_counts_all_lanes_of_a_seed() -> None:
    envs = make_vec(ENV_ID, 4, schedule_seeds=[1, 2], games="Pong,Freeway", change_every=30,
                    max_frames=100)  # fmt: skip
    envs.reset(seed=0)
    for step, action in enumerate(actions(4, 60), start=1):
        *_, terminated, truncated, infos = envs.step(action)
        task = 2 * step // 30
        params = {"game": float(task % 2), "mode": 0.0, "difficulty": 0.0}
        assert [envs.task_of(block) for block in (0, 1)] == [(task, params)] * 2
        assert envs.game_of(0) == ["Pong", "Freeway"][task % 2]
        for lane in np.flatnonzero(terminated | truncated):
            assert infos["task"][lane] == task


def test_change_now_ends_all_lanes_episodes_at_once() -> None:
    envs = make_vec(ENV_ID, 3, schedule_seeds=[0], games="Pong,Freeway", change_every=45,
                    change="now")  # fmt: skip
    envs.reset(seed=0)
    for step in range(1, 46):
        obs, _, terminated, truncated, infos = envs.step(np.zeros(3, int))
        assert truncated.tolist() == [step % 15 == 0] * 3 and not terminated.any()
        assert infos["task"].tolist() == [step // 15] * 3
        if truncated.any():
            assert infos["final_info"]["task"].tolist() == [step // 15 - 1] * 3
            assert infos["final_info"]["frames"].min() > infos["frames"].max()
            assert not obs[:, :3].any()
            assert all(final[0].any() for final in infos["final_obs"])


def test_make_vec_of_gymnasium_and_its_wrappers() -> None:
    envs = gym.make_vec(ENV_ID, num_envs=2, games="Pong", max_frames=12, render_mode="rgb_array")
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert envs.observation_space.shape == (2, 4, 84, 84) and envs.observation_space.dtype == "u1"
    assert isinstance(envs.single_action_space, gym.spaces.Discrete)
    wrapped = DictInfoToList(RecordEpisodeStatistics(envs))
    obs, infos = wrapped.reset(seed=[1, 2])
    assert envs.observation_space.contains(obs) and [info["game"] for info in infos] == ["Pong"] * 2
    assert [frame.shape for frame in envs.render()] == [(210, 160, 3)] * 2
    lengths = []
    for step in range(1, 7):
        _, _, terminated, truncated, infos = wrapped.step(envs.action_space.sample())
        assert not terminated.any() and truncated.tolist() == [step % 3 == 0] * 2
        lengths += [info["episode"]["l"] for info in infos if "episode" in info]
    assert lengths == [3, 3, 3, 3]


def test_what_a_step_returns_is_not_written_again() -> None:
    envs = make_vec(ENV_ID, 2, schedule_seeds=[0], games="Breakout", max_frames=30)
    kept = [envs.reset(seed=0)[0]]
    copies = [kept[0].copy()]
    for action in actions(2, 12):
        obs, *_, infos = envs.step(action)
        kept += [obs, infos["lives"], infos["frames"]]
        copies += [obs.copy(), infos["lives"].copy(), infos["frames"].copy()]
    for result, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(result, copy)
    with pytest.raises(ValueError):
        infos["task"][0] = 3
    kept[-3][:] = 7  # nor is what is written into it read
    expected = envs.get_state(0)["stack"]
    np.testing.assert_array_equal(expected, copies[-3])


def test_reset_seeds_by_number_list_and_none() -> None:
    envs = make_vec(ENV_ID, 2, schedule_seeds=[0], games="Breakout")

    def play(seed: Any) -> np.ndarray:
        envs.reset(seed=seed)
        return [envs.step(action)[0] for action in actions(2, 40)][-1]

    counted, listed, partly = play(8), play([8, 9]), play([8, None])
    np.testing.assert_array_equal(counted, listed)
    np.testing.assert_array_equal(partly[0], counted[0])
    assert (partly[1] != counted[1]).any()
    with pytest.raises(ValueError, match="reset takes 2 seeds"):
        envs.reset(seed=[1, 2, 3])


@pytest.mark.parametrize("given", [[0, 18], [-1, 0], [0.0, 1.0], [0], [[0, 1]]])
def test_actions_that_are_none_are_refused(given: Any) -> None:
    envs = make_vec(ENV_ID, 2, schedule_seeds=[0], games="Pong")
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="actions"):
        envs.step(np.array(given))


def test_states_of_something_else_are_refused_and_the_helpers_go_on() -> None:
    envs = make_vec(ENV_ID, 4, schedule_seeds=[0], games="Pong", threads=2)
    two = make_vec(ENV_ID, 2, schedule_seeds=[0], games="Pong")
    untouched = envs.get_state(0)
    envs.set_state(0, untouched)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="2 lanes per seed, not 4"):
        envs.set_state(0, two.get_state(0))
    state = envs.get_state(0)
    for lane in (0, 3):  # one here, one in the helper
        state["lanes"][lane]["applied"] = np.ones(3, np.uint8)
    with pytest.raises(ValueError, match="the saved Pong ends elsewhere"):
        envs.set_state(0, state)
    envs.reset(seed=0)
    assert envs.step(np.zeros(4, int))[0].shape == (4, 4, 84, 84)
    envs.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_helpers_end_with_the_environment() -> None:
    closed, dropped = (
        make_vec(ENV_ID, 3, schedule_seeds=[0], games="Pong", threads=2) for _ in range(2)
    )
    processes = [envs._bank._helpers[0]._process for envs in (closed, dropped)]
    assert all(process.poll() is None for process in processes)
    closed.close()
    del closed, dropped
    gc.collect()
    assert [process.poll() for process in processes] == [0, 0]


def test_a_helper_that_dies_is_one_line() -> None:
    envs = make_vec(ENV_ID, 2, schedule_seeds=[0], games="Pong", threads=2)
    envs.reset(seed=0)
    envs._bank._helpers[0]._process.kill()
    with pytest.raises(RuntimeError, match=r"helper process .* ended \(status -9\)"):
        for _ in range(3):
            envs.step(np.zeros(2, int))
    envs.close()


OWNER = """
import time
from perennial.envs import atari_bank, make_vec
envs = make_vec("perennial/AtariSwitch-v0", 2, schedule_seeds=[0], games="Pong", threads=2)
envs.reset(seed=0)
print(envs._bank._helpers[0]._process.pid, flush=True)
time.sleep(60)
"""


def test_helpers_end_with_a_killed_process() -> None:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        helper = int(owner.stdout.readline())
        assert alive(helper)
        owner.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not alive(helper):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the helper outlived its owner")


def test_this_process_plays_while_its_helpers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = make_vec(ENV_ID, 4, schedule_seeds=(0,), threads=2, games=GAMES[:1])
    envs.reset(seed=0)
    order: list[str] = []

    def noted(name: str, call: Any) -> Any:
        def run(*args: Any) -> Any:
            order.append(name)
            return call(*args)

        return run

    for kind, method in ((atari_bank.Row, "step"), (atari_bank._Helper, "receive")):
        monkeypatch.setattr(kind, method, noted(method, getattr(kind, method)))
    envs.step(np.zeros(4, int))
    assert order == ["step", "receive"]
    envs.close()
