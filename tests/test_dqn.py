"""DQN: targets by hand, values against dynamic programming, learning, exact resume."""

import itertools
from contextlib import nullcontext

import gymnasium as gym
import numpy as np
import pytest
import torch

from perennial.agents.checkpoint import checkpoints, read_checkpoint
from perennial.agents.config import UsageError, build_config
from perennial.agents.dqn import DQN, bootstrap, td_loss
from perennial.agents.dueling import Dueling
from perennial.agents.episodes import Episodes
from perennial.agents.loop import train_group
from perennial.agents.replay import Sample
from perennial.agents.streams import environment_seeds
from perennial.envs.vector import make_vec
from perennial.plasticity import values
from tests.plasticity_cases import ACTING
from tests.test_checkpoint import same
from tests.test_exactness import scalars
from tests.tiny_games import SIDE

VALUES = ["mse", "two-hot:low=-5,high=5,bins=51,symlog=false", "hl-gauss:low=-5,high=5",
          "c51:low=-5,high=5", "quantile:quantiles=21"]  # fmt: skip
GIVEN = {"batch_size": 16, "net_arch": (16, 16), "steps": 5000, "buffer_size": 500}


def agent_of(seeds=(0,), dtype=torch.float64, shape=(4,), actions=3, **given) -> DQN:
    config = build_config("dqn", given={"env": "CartPole-v1", **GIVEN, **given})
    space = gym.spaces.Box(-1, 1, shape)
    if len(shape) == 3:
        space = gym.spaces.Box(0, 255, shape, np.uint8)
    return DQN(config, space, gym.spaces.Discrete(actions), seeds, "cpu", 1, dtype)


def sample_of(rng, copies=1, batch=16, shape=(4,), actions=3) -> Sample:
    """The same random transitions for every copy."""
    if len(shape) == 3:
        seen = rng.integers(0, 256, (2, 1, batch, *shape), np.uint8)
    else:
        seen = rng.normal(size=(2, 1, batch, *shape))
    parts = (seen[0], rng.integers(0, actions, (1, batch)), rng.normal(size=(1, batch)),
             rng.choice([0.0, 0.9], (1, batch)), seen[1])  # fmt: skip
    return Sample(*(np.repeat(x, copies, 0) for x in parts))


class Play:
    """An agent in its environments, without the run around it."""

    def __init__(self, given, seeds=(0,)):
        self.config = config = build_config("dqn", given=given)
        lanes = config.num_envs
        self.envs = make_vec(
            config.env, len(seeds) * lanes, schedule_seeds=seeds, **config.env_args
        )
        spaces = self.envs.single_observation_space, self.envs.single_action_space
        self.agent = DQN(config, *spaces, tuple(seeds))
        self.episodes = Episodes(len(seeds), lanes)
        first = [x for s in seeds for x in environment_seeds(s, lanes)]
        self.agent.start(self.envs.reset(seed=first)[0])

    def advance(self) -> dict[str, np.ndarray]:
        return self.agent.advance(self.envs, self.episodes, lambda _: nullcontext(), lambda: False)


# ---- targets and networks ----------------------------------------------------------------------


def test_double_learning_by_hand():
    """The online network chooses, the target network tells the value."""
    delayed = torch.tensor([[[1.0, 5.0], [7.0, 2.0]]])[..., None]  # [S, B, n, 1]
    online = torch.tensor([[[9.0, 0.0], [9.0, 0.0]]])[..., None]
    rewards, discounts = torch.tensor([[1.0, 10.0]]), torch.tensor([[0.5, 0.0]])
    codec = values.make("mse")
    assert bootstrap(codec, delayed, delayed, rewards, discounts).tolist() == [[[3.5], [10.0]]]
    assert bootstrap(codec, delayed, online, rewards, discounts).tolist() == [[[1.5], [10.0]]]


def test_distributions_choose_by_their_mean():
    """Not by the most probable atom, nor by the sum of outputs."""
    codec = values.make("c51:low=0,high=2,bins=3")
    safe, risky = torch.tensor([0.0, 50.0, 0.0]), torch.tensor([1.0, 0.0, 0.9]) * 50
    delayed = torch.stack([safe, risky])[None, None]
    target = bootstrap(codec, delayed, delayed, torch.zeros(1, 1), torch.ones(1, 1))
    assert torch.allclose(target[0, 0], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("value_loss", VALUES)
def test_gradients_equal_autograd(value_loss, double):
    """One update of a weighted sample is a step along autograd's gradient of the loss."""
    agent = agent_of(value_loss=value_loss, double=double, max_grad_norm="none", huber=0.5)
    with torch.no_grad():
        for p in agent.targets.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    rng = np.random.default_rng(0)
    sample = sample_of(rng)._replace(weights=rng.uniform(0.1, 1.0, (1, 16)))
    obs, actions, rewards, discounts, following = (torch.from_numpy(x) for x in sample[:5])
    net, codec = agent.net, agent.codec

    def q(network, x):
        return network(x).unflatten(-1, (3, -1))

    with torch.no_grad():
        choice = codec.decode(q(net if double else agent.targets, following)).argmax(-1)
        after = q(agent.targets, following)[0, torch.arange(16), choice[0]][None]
        target = codec.backup(after, rewards, discounts)
    taken = q(net, obs)[0, torch.arange(16), actions[0]][None]
    if value_loss == "mse":
        error = (taken - target)[..., 0]
        loss = torch.nn.functional.huber_loss(error, 0 * error, reduction="none", delta=0.5)
    else:
        loss = codec.loss(taken, target).value
    mean = (loss * torch.from_numpy(sample.weights)).mean()
    expected = torch.autograd.grad(mean, list(net.parameters()))
    seen = agent.learn(sample)
    for p, g in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-12)
    wanted = error if value_loss == "mse" else loss
    assert torch.allclose(seen, wanted.detach())
    assert agent._means(0)["loss"][0] == pytest.approx(mean.item())


def test_squared_errors_where_huber_is_none():
    outputs, targets = torch.tensor([[[3.0]]]), torch.tensor([[[0.0]]])
    for huber, loss, gradient in ((None, 9.0, 6.0), (1.0, 2.5, 1.0), (5.0, 4.5, 3.0)):
        found = td_loss(values.make("mse"), outputs, targets, huber)
        assert (found[0].item(), found[1].item()) == (loss, gradient)


@pytest.mark.parametrize("shape", [(4,), (1, SIDE, SIDE), (2, 40, 36)])
@pytest.mark.parametrize("net_arch", [(8,), (16, 8)])
def test_dueling_streams(shape, net_arch):
    """Q = V + A - mean of A, per atom; the mean of Q is V; streams start and learn apart."""
    agent = agent_of((0, 1), shape=shape, net_arch=net_arch, dueling=True, value_loss="c51")
    net = agent.net
    assert isinstance(net, Dueling)
    x = agent._tensor(sample_of(np.random.default_rng(0), 2, 5, shape).observations)
    q = net(x).unflatten(-1, (3, 51))
    features = net.trunk(x)
    value, advantage = net.value(features), net.advantage(features).unflatten(-1, (3, 51))
    assert torch.allclose(q.mean(-2), value)
    assert torch.allclose(
        q - q.mean(-2, keepdim=True), advantage - advantage.mean(-2, keepdim=True)
    )
    assert (
        net.value[0].weight.shape
        == net.advantage[0].weight.shape
        == (2, net_arch[-1], features.shape[-1])
    )
    assert not torch.equal(net.value[0].weight, net.advantage[0].weight)
    before = [p.detach().clone() for p in net.parameters()]
    agent.learn(sample_of(np.random.default_rng(0), 2, 16, shape))
    for p, old in zip(net.parameters(), before, strict=True):
        assert (p != old).any()


def test_keys_of_metrics_name_the_network():
    for dueling in (False, True):
        play = Play({"env": "CartPole-v1", **GIVEN, "dueling": dueling, "train_freq": 50})
        play.advance()
        keys = play.agent.measure().keys()
        assert {k.split("/")[0] for k in keys} == {"q_net"}
        assert {"q_net/0/dormant_fraction", "q_net/1/dormant_fraction"} <= keys
        assert "q_net/dormant_fraction" in keys


# ---- exploration -------------------------------------------------------------------------------


def test_epsilon_falls_and_starts_again_when_told():
    for restart in (False, True):
        agent = agent_of((0, 1), eps_restart=restart, exploration_fraction=0.2, num_envs=2)
        explore = agent.explore
        explore.notice([0, 4], 0)
        assert explore.epsilon(0).tolist() == [1.0, 1.0]
        assert explore.epsilon(500) == pytest.approx([0.525] * 2)
        explore.notice([0, 5], 600)
        again = 0.525 if restart else 0.05
        assert explore.epsilon(1100) == pytest.approx([0.05, again])
        other = agent_of((0, 1), eps_restart=restart, exploration_fraction=0.2, num_envs=2)
        for copy in (0, 1):
            other.explore.load_state(copy, explore.state(copy))
        assert np.array_equal(other.explore.epsilon(1100), explore.epsilon(1100))


def test_random_actions_are_uniform_and_as_many_as_epsilon_says():
    agent = agent_of(num_envs=50, exploration_initial_eps=0.3, exploration_final_eps=0.3,
                     learning_starts=10)  # fmt: skip
    drawn = [agent.explore.draw(step) for step in range(10, 410)]
    explores = np.concatenate([e for e, _ in drawn], 1)
    actions = np.concatenate([a for _, a in drawn], 1)
    assert explores.mean() == pytest.approx(0.3, abs=0.015)
    shares = np.bincount(actions[explores], minlength=3) / explores.sum()
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)
    assert all(agent.explore.draw(step)[0].all() for step in range(10))


def test_actions_that_do_not_start_at_zero():
    config = build_config("dqn", given={"env": "CartPole-v1", **GIVEN})
    spaces = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(3, start=5)
    agent = DQN(config, *spaces, (0,))
    seen = np.random.default_rng(0).normal(size=(40, 2, 4)).astype(np.float32)
    actions = agent.act(seen)
    q = agent.net(torch.from_numpy(seen.reshape(1, 80, 4)))[0]
    assert actions.shape == (40, 2)
    assert np.array_equal(actions.reshape(-1) - 5, q.argmax(-1).numpy())
    assert agent.act(seen[0, 0]).shape == ()
    assert agent.asked(np.array([[0], [2]])).tolist() == [5, 7]


# ---- learning ----------------------------------------------------------------------------------


def tabular():
    """A random Markov decision process and its optimal values by value iteration."""
    rng, gamma = np.random.default_rng(3), 0.6
    chances = rng.dirichlet(np.full(5, 0.3), (5, 2))  # [s, a, s']
    rewards = rng.uniform(-2, 2, (5, 2))
    ends = rng.random((5, 2)) < 0.2
    q = np.zeros((5, 2))
    for _ in range(200):
        q = rewards + gamma * ~ends * (chances @ q.max(1))
    return chances, rewards, ends, gamma, q


@pytest.mark.parametrize("value_loss", VALUES)
@pytest.mark.parametrize("extras", [{}, {"double": True, "dueling": True}], ids=["", "extras"])
def test_values_equal_dynamic_programming(value_loss, extras):
    chances, rewards, ends, gamma, q = tabular()
    agent = agent_of(shape=(5,), actions=2, dtype=torch.float32, learning_rate=3e-3,
                     net_arch=(64,), value_loss=value_loss, **extras)  # fmt: skip
    rng = np.random.default_rng(0)
    for step in range(800):
        if step == 500:
            agent.optimizer.param_groups[0]["lr"] = 3e-4
        state, action = rng.integers(0, 5, 100), rng.integers(0, 2, 100)
        after = (rng.random((100, 1)) > chances[state, action].cumsum(-1)).sum(-1).clip(max=4)
        agent.learn(Sample(*(x[None] for x in (
            np.eye(5)[state], action, rewards[state, action],
            gamma * ~ends[state, action], np.eye(5)[after]))))  # fmt: skip
        if step % 20 == 0:
            agent._follow()
    found = agent._values(np.eye(5, dtype=np.float32)[None])[0]
    assert np.abs(found - q).max() < 0.25
    assert np.ptp(q) > 3


def test_prioritised_replay_sees_the_errors():
    """Priorities are the errors of the latest update, weights come to bear at the end."""
    play = Play({"env": "CartPole-v1", **GIVEN, "prioritized_replay": True, "train_freq": 50,
                 "prioritized_replay_alpha": 1.0})  # fmt: skip
    agent = play.agent
    play.advance()
    seen = {}
    sample, learn = agent.replay.sample, agent.learn
    agent.replay.sample = lambda *a, **k: seen.setdefault("sample", sample(*a, **k))
    agent.learn = lambda s: seen.setdefault("errors", learn(s))
    agent.update(1.0)
    places, errors = seen["sample"].places, seen["errors"].abs().numpy()[0]
    slots = places.rows[0] % agent.replay.rows
    last = {int(slot): error for slot, error in zip(slots, errors, strict=True)}
    leaves = agent.replay.priorities.leaves(0)
    for slot, error in last.items():
        assert leaves[slot] == pytest.approx(error, rel=1e-3, abs=1e-5)
    # beta = 1: weights are inverse to the chances.
    assert seen["sample"].weights.max() == 1.0 and seen["sample"].weights.min() < 0.96


@pytest.mark.parametrize("shape", [(4,), (1, SIDE, SIDE)], ids=["vectors", "pixels"])
@pytest.mark.parametrize("method", ACTING)
def test_every_method_runs(method, shape):
    """Each acts on a dueling network and its targets, and resumes exactly."""
    spec = ACTING[method][0]
    given = {"plasticity": [spec], "dueling": True, "double": True, "batch_size": 4}
    agents = [agent_of((3, 4), torch.float32, shape, **given) for _ in range(2)]
    rng = np.random.default_rng(0)
    samples = [sample_of(rng, 2, 4, shape) for _ in range(16)]
    for step, sample in enumerate(samples):
        if step == 8:
            for copy in (0, 1):
                agents[1].load_state(copy, agents[0].state(copy))
        agents[0].learn(sample)
        if step >= 8:
            agents[1].learn(sample)
        if step % 5 == 4:
            for agent in agents:
                agent._follow()
                agent.on_change([True, False])
    for copy in (0, 1):
        state, other = (agent.state(copy) for agent in agents)
        assert same(state["q_net"], other["q_net"])
        assert all(bool(w.isfinite().all()) for w in state["q_net"].values())
    if "every" in spec or "maturity" in spec:
        plain = agent_of((3, 4), torch.float32, shape, **{**given, "plasticity": []})
        for sample in samples:
            plain.learn(sample)
        ours, bare = agents[0].state(0)["q_net"], plain.state(0)["q_net"]
        assert any(not torch.equal(ours[k], bare[k]) for k in bare if k in ours)


@pytest.mark.parametrize("value_loss", VALUES)
def test_a_seed_feels_no_company(value_loss):
    """Seed 7 alone equals seed 7 of three, in float64; random actions too."""
    given = {"value_loss": value_loss, "dueling": True, "plasticity": ["cbp:rate=0.01,maturity=3"],
             "max_grad_norm": 0.1}  # fmt: skip
    alone, three = agent_of((7,), **given), agent_of((3, 7, 5), **given)
    rng = np.random.default_rng(0)
    for step in range(30):
        sample = sample_of(rng)
        alone.learn(sample)
        three.learn(Sample(*(np.repeat(x, 3, 0) for x in sample[:5])))
        one, several = alone.explore.draw(4000), three.explore.draw(4000)
        assert all(np.array_equal(a[0], b[1]) for a, b in zip(one, several, strict=True))
        if step % 10 == 0:
            alone._follow()
            three._follow()
    for a, b in zip(alone.net.parameters(), three.net.parameters(), strict=True):
        assert (a[0] - b[1]).abs().max() < 1e-9
        assert (a[0] - b[0]).abs().max() > 1e-3
    assert alone.counts()["cbp"][0] == three.counts()["cbp"][1] > 3


def test_rewards_are_clipped_for_learning_only():
    play = Play({"env": "CartPole-v1", **GIVEN, "reward_clip": 0.25, "train_freq": 50})
    play.advance()
    held = play.agent.replay.rewards[0, : play.agent.replay.written]
    assert np.unique(held).tolist() == [0.25]
    assert play.episodes.averages(0)["rollout/ep_rew_mean"] > 8


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, ["needs --env", "CartPole-v1"]),
        ({"exploration_final_eps": 0.5, "exploration_initial_eps": 0.1}, ["0.5", "0.1"]),
        ({"value_loss": "hl-gaus"}, ["hl-gauss"]),
        ({"exploration_fracton": 0.5}, ["exploration_fraction"]),
        ({"plasticity": ["crelu"], "net_arch": (15,)}, ["crelu", "15"]),
    ],
)
def test_mistakes_are_named(given, words):
    env = {"env": "CartPole-v1"} if given else {}
    with pytest.raises(UsageError) as caught:
        build_config("dqn", given={**env, **given})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_continuous_actions_are_refused():
    with pytest.raises(ValueError, match=r"dqn needs Discrete actions; CartPole-v1 has Box"):
        config = build_config("dqn", given={"env": "CartPole-v1", **GIVEN})
        DQN(config, gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (1,)), (0,))


# ---- runs --------------------------------------------------------------------------------------

GROUPS = {
    "vectors": {"env": "CartPole-v1", "steps": 2000, "learning_starts": 100, "train_freq": 5,
                "num_envs": 2, "buffer_size": 900, "n_step": 3, "batch_size": 16,
                "net_arch": (16, 16), "value_loss": "quantile:quantiles=5", "dueling": True,
                "double": True, "prioritized_replay": True, "exploration_fraction": 0.5},
    "atari": {"env": "perennial/AtariSwitch-v0", "steps": 1000, "learning_starts": 40,
              "env_args": {"games": "Pong,Breakout", "change_every": 300}, "train_freq": 8,
              "gradient_steps": 2, "buffer_size": 250, "n_step": 2, "batch_size": 4,
              "num_envs": 5, "net_arch": (8,), "value_loss": "c51", "prioritized_replay": True,
              "eps_restart": True, "at_change": "per-task", "seeds": (3,)},
}  # fmt: skip
COMMON = {"seeds": 2, "target_update_interval": 60, "plasticity": ["cbp:rate=0.01,maturity=5"]}


def train(group: str, folder, stopping=lambda: False):
    given = {**COMMON, **GROUPS[group]}
    every = given["steps"] // 2
    config = build_config("dqn", given={**given, "checkpoint_every": every, "metrics_every": every})
    for seed in config.seeds:
        (folder / f"seed-{seed}").mkdir(parents=True, exist_ok=True)
    train_group(config, config.seeds, folder, stopping=stopping)
    return config


@pytest.mark.parametrize("group", GROUPS)
def test_stopped_anywhere_and_resumed_equals_unbroken(group, tmp_path):
    """Replay, priorities, streams, networks, environments and log."""
    train(group, tmp_path / "unbroken")
    for calls in (9, 14):
        count = itertools.count()
        train(group, tmp_path / "broken", lambda: next(count) >= calls)  # noqa: B023
    train(group, tmp_path / "broken")
    for seed in GROUPS[group].get("seeds", (0, 1)):
        one, other = (tmp_path / name / f"seed-{seed}" for name in ("unbroken", "broken"))
        last = checkpoints(one)[-1]
        assert last == checkpoints(other)[-1] >= GROUPS[group]["steps"]
        assert same(read_checkpoint(one, last), read_checkpoint(other, last))
        assert (one / "episodes.csv").read_bytes() == (other / "episodes.csv").read_bytes()
        shown = scalars(one)
        assert shown == scalars(other)
        for tag in ("train/loss", "train/q_value", "train/exploration_rate",
                    "plasticity/q_net/dormant_fraction",
                    "intervention/cbp/units_reset"):  # fmt: skip
            assert shown[tag], tag
