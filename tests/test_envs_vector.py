"""The native vector environment: lanes equal single environments, state goes on bit for bit."""

import gc
import threading
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

import perennial.envs  # noqa: F401
from perennial.envs import make_vec
from perennial.envs.schedules import LogUniform, Schedule
from tests.states import through_files

ENV_ID = "perennial/SlipperyAnt-v0"
STEPS = 320


def actions(num: int, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1.2, 1.2, (steps, num, 8)).astype(np.float32)


def rollout(envs: Any, given: np.ndarray) -> Iterator[list[Any]]:
    """Everything that a step returns, flattened to lists of arrays."""
    for action in given:
        obs, rewards, terminated, truncated, infos = envs.step(action)
        row = [obs, rewards, terminated, truncated, infos["task"], *infos["task_params"].values()]
        if "final_obs" in infos:
            row += [row for row in infos["final_obs"] if row is not None]
            row += [infos["final_info"]["task"], *infos["final_info"]["task_params"].values()]
        yield row


def assert_same(one: Any, other: Any) -> None:
    count = 0
    for ours, theirs in zip(one, other, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
        count += 1
    assert count > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lanes_per_seed", [1, 3])
def test_lanes_equal_single_environments(lanes_per_seed: int, threads: int) -> None:
    schedule_seeds = [4, 9]
    num = 2 * lanes_per_seed
    options: dict[str, Any] = {"change_every": 60, "max_episode_steps": 70}
    envs = gym.make_vec(
        ENV_ID, num_envs=num, schedule_seed=schedule_seeds, threads=threads, **options
    )
    singles = [gym.make(ENV_ID, schedule_seed=s, **options) for s in np.repeat([4, 9], num // 2)]
    obs, infos = envs.reset(seed=11)
    for lane, single in enumerate(singles):
        first, info = single.reset(seed=11 + lane)
        np.testing.assert_array_equal(obs[lane], first, strict=True)
        assert infos["task_params"]["friction"][lane] == info["task_params"]["friction"]
    ended = {"terminated": 0, "truncated": 0}
    for step, action in enumerate(actions(num)):
        obs, rewards, terminated, truncated, infos = envs.step(action)
        for lane, single in enumerate(singles):
            # A lane alone counts its own steps; beside others its clock counts theirs too.
            single.unwrapped._clock.env_steps = (step + 1) * lanes_per_seed - 1
            row, reward, over, cut, info = single.step(action[lane])
            assert (rewards[lane], terminated[lane], truncated[lane]) == (reward, over, cut)
            if over or cut:
                np.testing.assert_array_equal(infos["final_obs"][lane], row, strict=True)
                assert infos["final_info"]["task"][lane] == info["task"]
                row, info = single.reset()
                ended["terminated"] += over
                ended["truncated"] += cut
            np.testing.assert_array_equal(obs[lane], row, strict=True)
            assert infos["task"][lane] == info["task"]
            assert infos["task_params"]["friction"][lane] == info["task_params"]["friction"]
        over = terminated | truncated
        assert ("final_obs" in infos) == ("final_info" in infos) == over.any()
        if over.any():
            np.testing.assert_array_equal(infos["_final_obs"], over)
            assert [row is not None for row in infos["final_obs"]] == over.tolist()
    assert min(ended.values()) > 0 and infos["task"].max() >= 4
    envs.close()


@pytest.mark.parametrize("change", ["episode", "now"])
def test_state_goes_on_bit_for_bit(change: str) -> None:
    options: dict[str, Any] = {"change_every": 130, "max_episode_steps": 50, "change": change}
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
    assert unbroken.task_of(0)[0] == 2 * STEPS * 3 // 130


def test_one_seed_goes_on_alone() -> None:
    options: dict[str, Any] = {"change_every": 70, "reference": "nature"}
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
        np.testing.assert_array_equal(expected[4]["task"][2:], ours[4]["task"])
    assert both.task_of(1) == alone.task_of(0) and alone.task_of(0)[0] > 3


def test_single_environment_state_goes_on() -> None:
    given = actions(1, 2 * STEPS)[:, 0]

    def walk(env: gym.Env[Any, Any], part: np.ndarray) -> Iterator[list[Any]]:
        for action in part:
            row = list(env.step(action))
            if row[2]:
                row += env.reset()
            yield row

    unbroken, resumed = (gym.make(ENV_ID, change_every=40).unwrapped for _ in range(2))
    unbroken.reset(seed=0)
    for _ in walk(unbroken, given[:STEPS]):
        pass
    resumed.set_state(through_files(unbroken.get_state(), {}))
    for expected, ours in zip(
        walk(unbroken, given[STEPS:]), walk(resumed, given[STEPS:]), strict=True
    ):
        np.testing.assert_equal(ours, expected)


def test_the_clock_counts_all_lanes_of_a_seed() -> None:
    envs = make_vec(ENV_ID, 8, schedule_seeds=[1, 2], change_every=100)
    envs.reset(seed=0)
    schedules = [Schedule(LogUniform(0.02, 2.0), 100, seed) for seed in (1, 2)]
    for step, action in enumerate(actions(8), start=1):
        _, _, terminated, truncated, infos = envs.step(action)
        task = 4 * step // 100
        for block, schedule in enumerate(schedules):
            assert envs.task_of(block) == (task, {"friction": schedule.value(task)})
        for lane in np.flatnonzero(terminated | truncated):
            assert infos["task"][lane] == task
        for lane, friction in enumerate(infos["task_params"]["friction"]):
            assert friction == schedules[lane // 4].value(infos["task"][lane])
            assert set(envs.models[lane].geom_friction[:, 0]) == {friction}


def test_change_now_reaches_all_lanes_at_once_and_leaves_final_info_behind() -> None:
    options: dict[str, Any] = {"change_every": 90, "change": "now", "max_episode_steps": 30}
    envs = make_vec(ENV_ID, 3, schedule_seeds=[0], **options)
    envs.reset(seed=0)
    told = []
    for step, action in enumerate(actions(3, 60), start=1):
        *_, infos = envs.step(0.0 * action)
        assert infos["task"].tolist() == [3 * step // 90] * 3
        if "final_info" in infos:
            told.append((step, infos["final_info"]["task"].tolist()))
    assert told == [(30, [0, 0, 0]), (60, [1, 1, 1])]


def test_make_vec_of_gymnasium() -> None:
    envs = gym.make_vec(ENV_ID, num_envs=3, max_episode_steps=5, friction=(0.5, 0.5))
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert envs.observation_space.shape == (3, 105) and envs.action_space.shape == (3, 8)
    obs, infos = envs.reset(seed=[1, 2, 3])
    assert obs.dtype == np.float64 and envs.observation_space.contains(obs)
    assert infos["task"].tolist() == [0, 0, 0]
    for step in range(1, 11):
        _, _, terminated, truncated, infos = envs.step(np.zeros((3, 8)))
        assert not terminated.any() and truncated.tolist() == [step % 5 == 0] * 3
    default = gym.make_vec(ENV_ID)
    assert default.num_envs == 1 and default._limit == 1000
    unlimited = gym.make_vec(ENV_ID, max_episode_steps=None)
    assert unlimited._limit is None


def test_gymnasiums_vector_wrappers_understand_the_infos() -> None:
    envs = gym.make_vec(ENV_ID, num_envs=2, max_episode_steps=4)
    wrapped = RecordEpisodeStatistics(envs)
    wrapped.reset(seed=0)
    for _ in range(4):
        *_, infos = wrapped.step(np.zeros((2, 8)))
    assert infos["episode"]["l"].tolist() == [4, 4]
    listed = DictInfoToList(gym.make_vec(ENV_ID, num_envs=2, max_episode_steps=4))
    listed.reset(seed=0)
    *_, per_lane = listed.step(np.zeros((2, 8)))
    assert [info["task"] for info in per_lane] == [0, 0]


def test_what_a_step_returns_is_not_written_again() -> None:
    envs = make_vec(ENV_ID, 2, schedule_seeds=[0], threads=2, max_episode_steps=3)
    kept = [envs.reset(seed=0)]
    copies = [kept[0][0].copy()]
    for action in actions(2, 10):
        result = envs.step(action)
        kept.append(result)
        copies.append(result[0].copy())
    for result, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(result[0], copy)
    with pytest.raises(ValueError):
        kept[-1][-1]["task"][0] = 3


def test_reset_seeds_by_number_list_and_none() -> None:
    envs = make_vec(ENV_ID, 2, schedule_seeds=[0])
    counted, _ = envs.reset(seed=8)
    listed, _ = envs.reset(seed=[8, 9])
    np.testing.assert_array_equal(counted, listed)
    partly, _ = envs.reset(seed=[8, None])
    np.testing.assert_array_equal(partly[0], counted[0])
    assert (partly[1] != counted[1]).any()
    with pytest.raises(ValueError, match="reset takes 2 seeds"):
        envs.reset(seed=[1, 2, 3])


def test_restart_starts_all_clocks_again() -> None:
    envs = make_vec(ENV_ID, 2, schedule_seeds=[0, 1], change_every=5)
    envs.reset(seed=0)
    for _ in range(12):
        envs.step(np.zeros((2, 8)))
    assert envs.reset()[1]["task"].tolist() == [2, 2]
    assert envs.reset(options={"restart": True})[1]["task"].tolist() == [0, 0]


def test_states_of_another_shape_are_refused() -> None:
    two, four = (make_vec(ENV_ID, n, schedule_seeds=[0]) for n in (2, 4))
    with pytest.raises(ValueError, match="2 lanes per seed, not 4"):
        four.set_state(0, two.get_state(0))
    state = two.get_state(0)
    state["lanes"][0]["physics"] = np.zeros(7)
    with pytest.raises(ValueError, match="ant state has 7 numbers"):
        two.set_state(0, state)


def test_threads_end_with_the_environment() -> None:
    before = threading.active_count()
    closed, dropped = (make_vec(ENV_ID, 4, schedule_seeds=[0], threads=3) for _ in range(2))
    for envs in (closed, dropped):
        envs.reset(seed=0)
        envs.step(np.zeros((4, 8)))
    assert threading.active_count() == before + 4
    closed.close()
    del closed, dropped, envs
    gc.collect()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.name.startswith("Thread-"):
            thread.join(timeout=5)
    assert threading.active_count() == before


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    envs = make_vec(ENV_ID, 4, schedule_seeds=[0], threads=2)
    envs.reset(seed=0)
    given = np.full((4, 8), "x", dtype=object)
    with pytest.raises((TypeError, ValueError)):
        envs.step(given)
    assert envs.step(np.zeros((4, 8)))[0].shape == (4, 105)
    envs.close()
