"""The single slippery ant: Gymnasium's Ant-v5 at friction 1, and changes that reach the physics."""

import os
import resource
import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import perennial.envs
from perennial.envs.schedules import LogUniform, Schedule

ENV_ID = "perennial/SlipperyAnt-v0"


def make(**kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make(ENV_ID, **kwargs)


@pytest.mark.parametrize("observation", ["v5", "v4", "v3"])
def test_gymnasium_and_sb3_checkers(observation: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(minimum|maximum|infinity).*")  # as Ant-v5's
        env = make(observation=observation)
        gymnasium_check_env(env.unwrapped, skip_render_check=True)
        warnings.filterwarnings("ignore", message=".*render.*")
        sb3_check_env(make(observation=observation), skip_render_check=True)


def same_as_gymnasium(reference: gym.Env[Any, Any], ours: gym.Env[Any, Any], pad: int) -> None:
    """Step both with the same raw actions, in both float widths, over several episodes."""
    rng = np.random.default_rng(0)
    expected, _ = reference.reset(seed=3)
    obs, info = ours.reset(seed=3)
    assert info["task_params"] == {"friction": 1.0}
    endings = 0
    for step in range(700):
        np.testing.assert_array_equal(np.pad(expected, (0, pad)), obs, strict=True)
        dtype = np.float32 if step % 3 else np.float64
        action = (1.2 * rng.standard_normal(8)).astype(dtype)  # a third beyond the bounds
        expected, reward, terminated, truncated, terms = reference.step(action)
        obs, our_reward, our_terminated, our_truncated, our_terms = ours.step(action)
        assert (our_reward, our_terminated, our_truncated) == (reward, terminated, truncated)
        assert our_terms["reward_ctrl"] == terms["reward_ctrl"]
        assert {key: our_terms[key] for key in terms} == terms
        if terminated or truncated:
            np.testing.assert_array_equal(np.pad(expected, (0, pad)), obs)
            expected, _ = reference.reset()
            obs, _ = ours.reset()
            endings += 1
    assert endings > 3


def test_equals_ant_v5_bit_for_bit() -> None:
    limit = {"max_episode_steps": 60}  # so that time limits occur as well
    same_as_gymnasium(gym.make("Ant-v5", **limit), make(friction=(1, 1), **limit), pad=0)


def test_v4_observation_has_27_numbers_and_ant_v5s_reward() -> None:
    reference = gym.make("Ant-v5", include_cfrc_ext_in_observation=False)
    same_as_gymnasium(reference, make(friction=(1, 1), observation="v4"), pad=0)


def test_v3_is_the_published_one_with_84_zeros_and_no_contact_cost() -> None:
    plain = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}
    ours = make(friction=(1, 1), observation="v3")
    assert ours.observation_space.shape == (111,)
    same_as_gymnasium(gym.make("Ant-v5", **plain), ours, pad=84)


def test_contact_cost_can_be_chosen() -> None:
    reference = gym.make("Ant-v5", contact_cost_weight=0)
    same_as_gymnasium(reference, make(friction=(1, 1), contact_cost=False), pad=0)


def test_actions_beyond_the_bounds_cost_what_they_ask_for() -> None:
    env = make()
    env.reset(seed=0)
    _, _, _, _, info = env.step(np.full(8, 10.0))
    assert info["reward_ctrl"] == -400.0
    assert env.unwrapped.data.ctrl.tolist() == [10.0] * 8  # the engine clamps the force, not this


@pytest.mark.parametrize("friction", [0.02, 0.7, 2.0])
def test_contacts_in_simulation_have_the_schedules_friction(friction: float) -> None:
    env = make(schedule="list", frictions=[0.3, friction], change_every=10)
    env.reset(seed=1)
    rng = np.random.default_rng(0)
    seen: dict[int, set[float]] = {0: set(), 1: set()}
    for _ in range(150):
        _, _, terminated, _, info = env.step(rng.uniform(-1, 1, 8))
        data = env.unwrapped.data
        seen[info["task"]] |= set(data.contact.friction[: data.ncon, :2].ravel().tolist())
        if terminated or env.unwrapped.data.time > 1:
            env.reset()
    assert seen == {0: {0.3}, 1: {friction}}


def test_changes_come_on_schedule_and_never_within_an_episode() -> None:
    env = make(change_every=50, schedule_seed=5)
    schedule = Schedule(LogUniform(0.02, 2.0), 50, 5)
    rng = np.random.default_rng(2)
    _, info = env.reset(seed=0)
    tasks = []
    for step in range(1, 1501):
        here = info["task"]
        _, _, terminated, truncated, info = env.step(rng.uniform(-1, 1, 8))
        assert info["task"] == here
        if terminated or truncated or step % 120 == 0:
            _, info = env.reset()
            assert info["task"] == step // 50
            tasks.append(info["task"])
        assert info["task_params"]["friction"] == schedule.value(info["task"])
        assert set(env.unwrapped.model.geom_friction[:, 0]) == {info["task_params"]["friction"]}
    assert tasks[-1] - tasks[0] > 20


def test_change_now_comes_at_the_very_step() -> None:
    env = make(change_every=50, change="now", friction=(0.02, 0.05), schedule_seed=1)
    env.reset(seed=0)
    tasks = []
    for _ in range(120):
        _, _, _, _, info = env.step(np.zeros(8))
        tasks.append(info["task"])
        assert env.unwrapped.model.geom_friction[0, 0] == info["task_params"]["friction"]
    assert tasks == [0] * 49 + [1] * 50 + [2] * 21


def test_reference_nature_changes_at_the_first_episode_end_after() -> None:
    env = make(change_every=100, reference="nature", friction=(0.02, 0.02))
    tasks = []
    env.reset(seed=0)
    for length in (100, 1, 99, 1, 1, 350, 90, 11):
        for _ in range(length):
            env.step(np.zeros(8))
        tasks.append(env.reset()[1]["task"])
    assert tasks == [0, 1, 1, 1, 2, 3, 3, 4]


def test_reset_reseeds_physics_only_and_restart_restarts_the_clock() -> None:
    env = make(change_every=10)
    first, _ = env.reset(seed=7)
    for _ in range(25):
        env.step(np.zeros(8))
    again, info = env.reset(seed=7)
    assert info["task"] == 2
    np.testing.assert_array_equal(first, again)
    _, info = env.reset(options={"restart": True})
    assert info["task"] == 0


def test_schedule_seed_and_physics_seed_are_apart() -> None:
    one, other = make(schedule_seed=1), make(schedule_seed=2)
    (obs, info), (other_obs, other_info) = one.reset(seed=0), other.reset(seed=0)
    np.testing.assert_array_equal(obs, other_obs)
    assert info["task_params"] != other_info["task_params"]


def test_a_task_can_be_held() -> None:
    env = make(task=3, change_every=5)
    for _ in range(3):
        _, info = env.reset(seed=0)
        assert info["task"] == 3
        assert info["task_params"]["friction"] == Schedule(LogUniform(0.02, 2.0), 5).value(3)
        for _ in range(12):
            env.step(np.zeros(8))


def test_a_thousand_changes_leak_nothing() -> None:
    def change_often(times: int) -> int:
        for _ in range(times):
            env.step(action)
            env.reset()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    env = make(change_every=1)
    action = np.zeros(8)
    env.reset(seed=0)
    before = change_often(200)
    after = change_often(1000)
    _, info = env.reset()
    assert info["task"] == 1200
    assert after - before < 2048


def test_wrong_action_shape_is_one_line() -> None:
    env = make().unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(8,\); got \(7,\)"):
        env.step(np.zeros(7))


RENDER = """
import gymnasium, perennial.envs
for id, given in ("Ant-v5", {}), ("perennial/SlipperyAnt-v0", {"friction": (1, 1)}):
    env = gymnasium.make(id, render_mode="rgb_array", **given)
    env.reset(seed=0)
    env.step([1.0] * 8)
    frame = env.render()
    print(frame.shape, frame.dtype, frame.std() > 5, hash(frame.tobytes()))
    env.close()
envs = perennial.envs.make_vec(id, 2, schedule_seeds=[0], render_mode="rgb_array", **given)
envs.reset(seed=0)
envs.step([[1.0] * 8] * 2)
frame, other = envs.render()
print(frame.shape, frame.dtype, (frame != other).any(), hash(frame.tobytes()))
envs.close()
"""


def test_renders_the_frame_that_ant_v5_renders() -> None:
    """In a process of its own: the GL library is chosen when mujoco is imported."""
    for library in ("egl", "osmesa"):
        chosen = {**os.environ, "MUJOCO_GL": library, "PYTHONHASHSEED": "0"}
        probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
        if subprocess.run(probe, env=chosen, capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("no off-screen GL library here")
    command = [sys.executable, "-c", RENDER]
    done = subprocess.run(command, env=chosen, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected, ours, lane = done.stdout.splitlines()
    assert expected.startswith("(480, 480, 3) uint8 True")
    assert ours == lane == expected


def test_registered_through_the_package() -> None:
    assert perennial.envs.make_vec.__module__ == "perennial.envs.vector"
    assert gym.spec(ENV_ID).max_episode_steps == 1000
