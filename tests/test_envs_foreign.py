"""Any registered environment through `make_vec`: one interface, exact state where it can be."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from perennial.envs import make_vec, state
from tests.states import through_files

STEPS = 320
SHORT = {"max_episode_steps": 50}


def rollout(envs: Any, given: list[Any]) -> Iterator[list[Any]]:
    for action in given:
        obs, rewards, terminated, truncated, infos = envs.step(action)
        final = [row for row in infos.get("final_obs", []) if row is not None]
        yield [obs, rewards, terminated, truncated, infos["task"], final]


def sampled(envs: Any, steps: int) -> list[Any]:
    envs.action_space.seed(0)
    return [envs.action_space.sample() for _ in range(steps)]


EXACT = [
    "Pendulum-v1", "CartPole-v1", "MountainCarContinuous-v0", "MountainCar-v0", "Acrobot-v1",
    "FrozenLake-v1", "Taxi-v4", "CliffWalking-v1",
    "HalfCheetah-v5", "Ant-v5", "Ant-v4", "Humanoid-v5", "HumanoidStandup-v5", "Hopper-v5",
    "Walker2d-v5", "Swimmer-v5", "Reacher-v5", "Reacher-v4", "Pusher-v5", "InvertedPendulum-v5",
    "InvertedDoublePendulum-v5",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
@pytest.mark.parametrize("env_id", EXACT)
def test_state_goes_on_bit_for_bit(env_id: str) -> None:
    heavy = env_id.startswith(("Humanoid", "Pusher"))
    steps = 60 if heavy else STEPS
    unbroken = make_vec(env_id, 2, schedule_seeds=[0, 1], max_episode_steps=25)
    given = sampled(unbroken, 2 * steps)
    unbroken.reset(seed=3)
    for _ in rollout(unbroken, given[:steps]):
        pass
    states = [through_files(unbroken.get_state(block), {}) for block in (0, 1)]
    assert [saved["exact"] for saved in states] == [True, True]
    resumed = make_vec(env_id, 2, schedule_seeds=[0, 1], max_episode_steps=25)
    for block in (0, 1):
        assert resumed.set_state(block, states[block]) is None
    ends = 0
    pairs = zip(rollout(unbroken, given[steps:]), rollout(resumed, given[steps:]), strict=True)
    for expected, ours in pairs:
        np.testing.assert_equal(ours, expected)
        ends += len(ours[-1])
    assert ends > 1


def test_lanes_equal_gymnasiums_own() -> None:
    envs = make_vec("CartPole-v1", 2, schedule_seeds=[0], **SHORT)
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    reference = gym.make_vec("CartPole-v1", 2, "sync", vector_kwargs=mode, **SHORT)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    np.testing.assert_array_equal(envs.reset(seed=1)[0], reference.reset(seed=1)[0])
    for action in sampled(envs, 100):
        expected, ours = reference.step(action), envs.step(action)
        assert ours[4].pop("task").tolist() == [0, 0]
        for infos in (expected[4], ours[4]):  # numpy cannot compare arrays of arrays
            infos["final_obs"] = list(infos.get("final_obs", []))
        np.testing.assert_equal(ours, expected)
    assert envs.task_of(0) == (0, {})


def test_float64_actions_are_cast_and_never_clipped() -> None:
    envs = make_vec("HalfCheetah-v5", 1, schedule_seeds=[0])
    envs.reset(seed=0)
    *_, infos = envs.step(np.full((1, 6), 3.0))
    assert infos["reward_ctrl"][0] == pytest.approx(-0.1 * 6 * 9)


class Counter(gym.Env[Any, Any]):
    """A third-party environment with state of its own; counts to four."""

    observation_space = gym.spaces.Box(0, 100, (1,), np.float64)
    action_space = gym.spaces.Discrete(2)

    def __init__(self) -> None:
        self.hidden = {"count": [0]}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.hidden["count"][0] = int(self.np_random.integers(3))
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.hidden["count"][0] += 1
        return self._obs(), 1.0, self.hidden["count"][0] > 8, False, {}

    def _obs(self) -> Any:
        return np.array([float(self.hidden["count"][0])])


class CounterWithState(Counter):
    def get_state(self) -> dict[str, Any]:
        return {"count": self.hidden["count"][0]}

    def set_state(self, saved: dict[str, Any]) -> None:
        self.hidden["count"][0] = saved["count"]


@pytest.fixture(autouse=True)
def third_party() -> Iterator[None]:
    gym.register("test/Counter-v0", Counter, max_episode_steps=20)
    gym.register("test/CounterWithState-v0", CounterWithState, max_episode_steps=20)
    yield
    del gym.registry["test/Counter-v0"], gym.registry["test/CounterWithState-v0"]


def test_an_environment_with_its_own_state_goes_on() -> None:
    unbroken, resumed = (make_vec("test/CounterWithState-v0", 2, schedule_seeds=[0]) for _ in "ab")
    given = sampled(unbroken, 60)
    unbroken.reset(seed=0)
    for _ in rollout(unbroken, given[:31]):
        pass
    saved = through_files(unbroken.get_state(0), {})
    assert saved["exact"] and resumed.set_state(0, saved) is None
    for expected, ours in zip(rollout(unbroken, given), rollout(resumed, given), strict=True):
        np.testing.assert_equal(ours, expected)


def test_an_unknown_environment_starts_afresh_the_same_way_each_time() -> None:
    envs = make_vec("test/Counter-v0", 2, schedule_seeds=[0])
    envs.reset(seed=0)
    for _ in range(3):
        envs.step([0, 0])
    saved = through_files(envs.get_state(0), {})
    assert saved["exact"] is False
    starts = []
    for _ in range(2):
        resumed = make_vec("test/Counter-v0", 2, schedule_seeds=[0])
        starts.append(resumed.set_state(0, saved))
        assert starts[-1].shape == (2, 1) and starts[-1].max() < 3
        np.testing.assert_array_equal(resumed.step([0, 0])[0], starts[-1] + 1)
    np.testing.assert_array_equal(starts[0], starts[1])


def test_an_unknown_wrapper_makes_it_inexact() -> None:
    class Sticky(gym.Wrapper[Any, Any, Any, Any]):
        pass

    env = gym.make("CartPole-v1", disable_env_checker=True)
    env.reset(seed=0)
    assert state.capture(env)["exact"] is True
    assert state.capture(Sticky(env))["exact"] is False
    assert state.capture(gym.wrappers.NormalizeObservation(env))["exact"] is False


def test_the_slippery_ant_in_its_wrappers_goes_on() -> None:
    options = {"max_episode_steps": 9, "disable_env_checker": True}
    one, other = (gym.make("perennial/SlipperyAnt-v0", **options) for _ in range(2))
    one.reset(seed=0)
    for _ in range(5):
        one.step(np.zeros(8))
    state.restore(other, through_files(state.capture(one), {}))
    for _ in range(4):
        expected, ours = one.step(np.ones(8)), other.step(np.ones(8))
        np.testing.assert_equal(ours, expected)
    assert ours[3] is True


def test_a_state_of_another_environment_is_refused() -> None:
    cart, pendulum = (make_vec(i, 1, schedule_seeds=[0]) for i in ("CartPole-v1", "Hopper-v5"))
    for envs in (cart, pendulum):
        envs.reset(seed=0)
    with pytest.raises(ValueError, match="the saved state is not of Hopper-v5"):
        pendulum.set_state(0, cart.get_state(0))
    with pytest.raises(ValueError, match="1 lanes per seed, not 2"):
        make_vec("CartPole-v1", 2, schedule_seeds=[0]).set_state(0, cart.get_state(0))
