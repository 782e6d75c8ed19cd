"""PPO on networks that a method changed: acting, learning, seeds apart, checkpoints, refusals."""

import numpy as np
import pytest
import torch

from perennial.agents.config import UsageError, build_config
from perennial.agents.episodes import Episodes
from perennial.agents.networks import Autograd, WrittenOut
from perennial.agents.ppo import PPO, Batch
from perennial.agents.streams import environment_seeds
from perennial.envs.vector import make_vec
from tests.test_checkpoint import same

LISTS = [
    ["layer-norm", "cbp:rate=0.02,maturity=5"],
    ["crelu", "cbp:rate=0.02,maturity=5"],
    ["fourier", "l2:strength=1e-4"],
    ["nap", "cbp:rate=0.02,maturity=5"],
    ["crelu:width=keep", "nap:gains=project"],
    ["weight-norm", "cbp:rate=0.02,maturity=5"],
    ["simba", "cbp:rate=0.02,maturity=5"],
    ["simba:version=2"],
]


def agent_of(seeds, plasticity, **options):
    given = {"env": "Pendulum-v1", "n_steps": 64, "batch_size": 32, "n_epochs": 3,
             "net_arch": (16, 16), "steps": 1000, "seeds": seeds, "plasticity": plasticity,
             **options}  # fmt: skip
    config = build_config("ppo", given=given)
    envs = make_vec(config.env, len(seeds), schedule_seeds=seeds)
    space = envs.single_observation_space, envs.single_action_space
    agent = PPO(config, *space, tuple(seeds), dtype=torch.float64)
    agent.start(envs.reset(seed=[lane for s in seeds for lane in environment_seeds(s, 1)])[0])
    return agent, envs


@pytest.mark.parametrize("plasticity", LISTS, ids=" ".join)
def test_a_seed_alone_equals_the_seed_among_three(plasticity):
    together, envs3 = agent_of((5, 7, 3), plasticity)
    alone, envs1 = agent_of((7,), plasticity)
    for a, b in zip(alone.net.parameters(), together.net.parameters(), strict=True):
        assert torch.equal(a[0], b[1])
    first = [p.detach().clone() for p in alone.net.parameters()]
    alone.collect(envs1, Episodes(1, 1))
    together.collect(envs3, Episodes(3, 1))
    assert np.allclose(alone.outputs[0], together.outputs[1], atol=1e-12)  # acting
    rollout = [x.flatten(1, 2) for x in (alone.observations, alone.actions, alone.outputs)]
    assert torch.allclose(alone.net.policy(rollout[0]), rollout[2], atol=1e-12)
    data = [*rollout[:2], alone.net.distribution.log_prob(rollout[2], rollout[1])]
    values = alone.values(rollout[0])
    advantages = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).double()
    data += [values, advantages, advantages + values]
    for _ in range(3):
        orders = [agent.minibatch_order.permutations(64, 3) for agent in (alone, together)]
        alone.learn(Batch(*data), torch.from_numpy(orders[0]))
        three = [x.expand(3, *x.shape[1:]).clone() for x in data]
        together.learn(Batch(*three), torch.from_numpy(orders[1]))
    for a, b, old in zip(alone.net.parameters(), together.net.parameters(), first, strict=True):
        assert torch.allclose(a[0], b[1], atol=1e-9) and not torch.equal(a, old)
    counts = [agent.handle.counts() for agent in (alone, together)]
    for name, count in counts[0].items():
        assert count[0] == counts[1][name][1] > 0


@pytest.mark.parametrize("plasticity", [["crelu", "nap"], ["simba:version=2", "cbp"]], ids=" ".join)
def test_state_continues_bit_for_bit(plasticity):
    agent, envs = agent_of((7, 8), plasticity)
    for _ in range(2):
        agent.collect(envs, Episodes(2, 1))
        agent.update(0.0)
    other, _ = agent_of((1, 8), plasticity)
    for copy in range(2):
        other.load_state(copy, agent.state(copy))
    order = torch.from_numpy(agent.minibatch_order.permutations(64, 3))
    x = torch.randn(2, 64, 3).double()
    values = agent.values(x)
    data = Batch(x, torch.randn(2, 64, 1).double(), -values.abs(), values, values, values)
    for each in (agent, other):
        each.learn(data, order)
    for copy in range(2):
        states = agent.state(copy), other.state(copy)
        for part in ("weights", "optimizer", "interventions"):
            assert same(states[0][part], states[1][part])


def test_only_plain_networks_take_the_written_out_passes():
    for method, kind in (("layer-norm", WrittenOut), ("crelu", Autograd), ("nap", Autograd)):
        agent, _ = agent_of((0,), [method])
        assert isinstance(agent.sides.passes[0], kind)
        assert (agent.sides.acting is None) == (kind is Autograd)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"plasticity": ["crelu"], "net_arch": (32, 33)}, "33 is odd; take 34"),
        ({"plasticity": ["fourier"], "net_arch": (5,)}, "5 is odd"),
        ({"plasticity": ["crelu", "fourier"]}, "both set the nonlinearity"),
        ({"plasticity": ["nap", "layer-norm"]}, "both normalise"),
        ({"plasticity": ["simba"], "net_arch": (64, 32)}, "have 64, 32"),
        ({"plasticity": ["layer-norm", "simba"]}, "leave layer-norm"),
        ({"plasticity": ["nap:gains=project"], "activation": "tanh"}, "not tanh; take gains=decay"),
        ({"plasticity": ["nap:gains=project", "fourier"]}, "not fourier"),
        ({"plasticity": ["simba:version=3"]}, "version=3 must be"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_configuration(options, match):
    with pytest.raises(UsageError, match=match) as caught:
        build_config("ppo", given={"env": "Pendulum-v1", **options})
    assert "\n" not in str(caught.value)


def test_what_fits_is_let_through():
    for options in (
        {"plasticity": ["crelu:width=keep"], "net_arch": (33, 5)},
        {"plasticity": ["nap:gains=project", "crelu"], "activation": "tanh"},
        {"plasticity": ["layer-norm", "crelu", "cbp"], "net_arch": (4, 6)},
    ):
        config = build_config("ppo", given={"env": "Pendulum-v1", **options})
        assert config.plasticity == tuple(options["plasticity"])
