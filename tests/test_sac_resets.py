"""SAC starting over: a whole new agent on the old replay; priming; soft values that are known."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch

from perennial.agents.checkpoint import checkpoints, read_checkpoint
from perennial.agents.config import build_config
from perennial.agents.loop import train_group
from perennial.agents.replay import Sample
from perennial.agents.sac import SAC
from tests.test_checkpoint import same
from tests.test_exactness import scalars

BATCH = 16


def agent_of(seeds=(0, 1), **given) -> SAC:
    options = {"env": "Pendulum-v1", "steps": 5000, "batch_size": BATCH, "net_arch": (16, 16),
               "buffer_size": 500, "learning_rate": 1e-2}  # fmt: skip
    config = build_config("sac", given=options | given)
    boxes = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Box(-1, 1, (1,))
    return SAC(config, *boxes, tuple(seeds))


def batches(copies: int, count: int):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    for _ in range(count):
        sample = Sample(normal(copies, BATCH, 3), np.tanh(normal(copies, BATCH, 1)),
                        normal(copies, BATCH), np.full((copies, BATCH), np.float32(0.9)),
                        normal(copies, BATCH, 3))  # fmt: skip
        yield sample, torch.from_numpy(normal(copies, 2, BATCH, 1))


def weights(agent: SAC) -> list[torch.Tensor]:
    nets = agent.actor, agent.critics.net, agent.critics.targets
    return [p.detach().clone() for net in nets for p in net.parameters()]


@pytest.mark.parametrize("more", [(), ("cbp:rate=0.1,maturity=2", "hare-tortoise:every=4")])
def test_a_reset_makes_a_whole_new_agent(more):
    """Targets equal to the critics, temperature and every Adam at the start, other weights."""
    agent = agent_of(plasticity=("reset:every=5", *more), ent_coef="auto_0.3")
    drawn = [weights(agent)]
    for k, (sample, noise) in enumerate(batches(2, 15), 1):
        agent.learn(sample, noise)
        if k % 5:
            assert not torch.allclose(agent.log_ent_coef.exp(), torch.tensor(0.3), rtol=1e-4)
            continue
        drawn.append(weights(agent))
        assert torch.allclose(agent.log_ent_coef.exp(), torch.tensor(0.3))
        for a, b in zip(
            agent.critics.net.parameters(), agent.critics.targets.parameters(), strict=True
        ):
            assert torch.equal(a, b)
        for optimizer in (agent.optimizer, agent.critics.optimizer, agent.temperature.optimizer):
            for copy in range(2):
                assert not any(value.any() for value in optimizer.state_of(copy).values())
    for one, other in itertools.combinations(drawn, 2):
        for a, b in zip(one, other, strict=True):
            assert all((a[c] != b[c]).any() for c in range(len(a)))  # no seed, no twin again
    first, *_, last = drawn
    for a, b in zip(first, last, strict=True):
        if a.shape[-1] == 16 and a.ndim == 3:  # as wide as initial weights
            assert b.std().item() == pytest.approx(a.std().item(), rel=0.3)


def test_after_a_reset_learning_is_that_of_a_fresh_agent():
    agent, fresh = agent_of(plasticity=("reset:every=4,times=1",)), agent_of()
    given = list(batches(2, 10))
    for sample, noise in given[:4]:
        agent.learn(sample, noise)
    with torch.no_grad():
        for net, other in (
            (agent.actor, fresh.actor),
            (agent.critics.net, fresh.critics.net),
            (agent.critics.targets, fresh.critics.targets),
        ):
            for a, b in zip(net.parameters(), other.parameters(), strict=True):
                b.copy_(a)
    for sample, noise in given[4:]:
        agent.learn(sample, noise)
        fresh.learn(sample, noise)
    for a, b in zip(weights(agent), weights(fresh), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(agent.log_ent_coef, fresh.log_ent_coef)


def test_a_partial_reset_keeps_the_temperature():
    agent = agent_of(plasticity=("head-reset:every=3",))
    for sample, noise in batches(2, 3):
        agent.learn(sample, noise)
    assert (agent.log_ent_coef != 0).all()
    assert all(v.any() for v in agent.temperature.optimizer.state_of(0).values())


RUN = {"env": "Pendulum-v1", "steps": 2000, "batch_size": BATCH, "net_arch": (16, 16),
       "buffer_size": 1500, "learning_starts": 990, "priming_steps": 150, "train_freq": 5,
       "num_envs": 5, "reward_clip": "0.5", "plasticity": ("reset:every=200",)}  # fmt: skip


def train(folder, stopping=lambda: False):
    config = build_config("sac", given=RUN)
    (folder / "seed-0").mkdir(parents=True, exist_ok=True)
    train_group(config, (0,), folder, stopping=stopping)
    return folder / "seed-0"


def test_priming_and_resets_go_on_bit_for_bit(tmp_path):
    """Stopped amid priming, which here begins where the log has a point."""
    unbroken = train(tmp_path / "unbroken")
    for calls in (60, 80, 60):
        count = itertools.count()
        broken = train(tmp_path / "broken", lambda: next(count) >= calls)  # noqa: B023
    assert checkpoints(broken)[-1] < 2000
    train(tmp_path / "broken")
    end = read_checkpoint(unbroken, 2000)
    assert same(end, read_checkpoint(broken, 2000))
    assert (unbroken / "episodes.csv").read_bytes() == (broken / "episodes.csv").read_bytes()
    assert scalars(unbroken) == scalars(broken)
    assert end["agent"]["updates"] == 150 + 1000 // 25  # an update in 25 env steps
    replay = end["agent"]["replay"]
    assert np.abs(replay["rewards"]).max() == 0.5  # learned from clipped, logged raw
    returns = [float(r.split(",")[2]) for r in (unbroken / "episodes.csv").read_text().split()[1:]]
    assert min(returns) < -500


def best_entropy() -> float:
    """The largest entropy of tanh(std x), x normal, by quadrature over x."""
    x = np.linspace(-9, 9, 20_001)
    density = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
    found = []
    for std in np.linspace(0.5, 1.5, 201):
        slope = np.log1p(-(np.tanh(std * x) ** 2) + 1e-6)
        found.append(
            0.5 * np.log(2 * np.pi * np.e) + np.log(std) + (density * slope).sum() * (x[1] - x[0])
        )
    return max(found)


@pytest.mark.parametrize("value_loss", ["mse", "hl-gauss:low=-5,high=5"])
def test_soft_values_are_those_of_dynamic_programming(value_loss):
    """Three states in a row whose rewards no action changes: the best policy is all entropy.

    V(s) = Q(s) + alpha H, Q(s) = r(s) + gamma V(next), and nothing after the last state.
    """
    alpha, gamma, rewards = 0.5, 0.9, np.array([1.0, -0.5, 2.0])
    agent = agent_of((3,), ent_coef=str(alpha), gamma=gamma, value_loss=value_loss, tau=0.05,
                     learning_rate=3e-3, net_arch=(32, 32))  # fmt: skip
    rng = np.random.default_rng(0)
    states = np.eye(3, dtype=np.float32)
    for _ in range(1500):
        at = rng.integers(0, 3, BATCH)
        actions = rng.uniform(-1, 1, (1, BATCH, 1)).astype(np.float32)
        discounts = np.where(at < 2, gamma, 0.0).astype(np.float32)
        sample = Sample(states[at][None], actions, rewards[at].astype(np.float32)[None],
                        discounts[None], states[(at + 1) % 3][None])  # fmt: skip
        noise = rng.normal(size=(1, 2, BATCH, 1)).astype(np.float32)
        agent.learn(sample, torch.from_numpy(noise))
    entropy = best_entropy()
    values = [rewards[2]]
    for reward in rewards[1::-1]:
        values.insert(0, reward + gamma * (values[0] + alpha * entropy))
    spread = torch.linspace(-0.9, 0.9, 7)
    for state, expected in enumerate(values):
        seen = torch.from_numpy(states[state]).expand(1, 7, 3)
        pairs = torch.cat([seen, spread[None, :, None]], -1).expand(2, -1, -1)
        q = agent.critics.codec.decode(agent.critics.net(pairs)).detach()
        assert np.abs(q.numpy() - expected).max() < 0.1
    output = agent.actor(torch.from_numpy(states)[None]).detach()
    drawn = agent.squash.sample(
        output.repeat_interleave(4000, 1), torch.from_numpy(rng.normal(size=(1, 12000, 1))).float()
    )
    assert -drawn.log_prob.mean() == pytest.approx(entropy, abs=0.05)
