"""PPO on images: parity with SB3's CnnPolicy, trunks, methods, state, learning."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import stable_baselines3
import stable_baselines3.common.policies
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from perennial.agents import load, run
from perennial.agents.config import build_config
from perennial.agents.episodes import Episodes
from perennial.agents.evaluate import evaluate
from perennial.agents.minibatches import Batch
from perennial.agents.ppo import PPO
from perennial.agents.streams import environment_seeds
from perennial.envs.vector import make_vec
from tests.test_checkpoint import same
from tests.test_ppo_parity import double_sb3, update_both  # noqa: F401 (a fixture)
from tests.tiny_games import Catch

CATCH = "tests.tiny_games:tests/Catch-v0"
BIG = "tests.tiny_games:tests/BigCatch-v0"
# Our places in the Nature CNN -> SB3's layers.
TRUNK = {"1": "cnn.0", "3": "cnn.2", "5": "cnn.4", "8": "linear.0"}
LOSSES = (
    "policy_gradient_loss",
    "value_loss",
    "entropy_loss",
    "approx_kl",
    "clip_fraction",
    "loss",
)


def sb3_name(name: str) -> str:
    path, _, kind = name.rpartition(".")
    net, *rest = path.split(".")
    if net == "shared":
        if rest[0] == "trunk":
            return f"features_extractor.{TRUNK[rest[1]]}.{kind}"
        return {"policy": "action_net", "value": "value_net"}[rest[0]] + f".{kind}"
    if rest == ["10"]:
        return {"policy": "action_net", "value": "value_net"}[net] + f".{kind}"
    side = {"policy": "pi", "value": "vf"}[net]
    return f"{side}_features_extractor.{TRUNK[rest[0]]}.{kind}"


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_an_update_equals_sb3s_cnn_policy_in_float64(trunk, double_sb3, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        stable_baselines3.common.policies, "preprocess_obs", lambda obs, *a, **k: obs.double() / 255
    )
    given = {"env": BIG, "n_steps": 128, "num_envs": 2, "batch_size": 32, "n_epochs": 3,
             "steps": 10_000, "trunk": trunk, "ent_coef": 0.01, "max_grad_norm": 0.1,
             "learning_rate": 1e-3}  # fmt: skip
    config = build_config("ppo", given=given)
    theirs = stable_baselines3.PPO(
        "CnnPolicy", make_vec_env(lambda: Catch(scale=4), 2, seed=0), learning_rate=1e-3,
        n_steps=128, batch_size=32, n_epochs=3, ent_coef=0.01, max_grad_norm=0.1, seed=0,
        policy_kwargs={"share_features_extractor": trunk == "shared"}, device="cpu",
    )  # fmt: skip
    theirs.policy.double()
    _, callback = theirs._setup_learn(10_000)
    theirs.set_logger(configure(None, []))
    assert theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, 128)
    spaces = theirs.observation_space, theirs.action_space
    ours = PPO(config, *spaces, seeds=(0,), dtype=torch.float64)
    weights = theirs.policy.state_dict()
    with torch.no_grad():
        for name, parameter in ours.net.named_parameters():
            parameter[0].copy_(weights[sb3_name(name)])
    before = [p.detach().clone() for p in ours.net.parameters()]
    losses, logged = update_both(theirs, ours, torch.float64)
    weights = theirs.policy.state_dict()
    for (name, parameter), old in zip(ours.net.named_parameters(), before, strict=True):
        assert (parameter - old).abs().max() > 1e-4, name
        assert (parameter[0] - weights[sb3_name(name)]).abs().max() <= 1e-10, name
    for key in LOSSES:
        assert losses[key][0] == pytest.approx(logged[f"train/{key}"], abs=1e-10), key


def agent_of(seeds, plasticity=(), **options):
    given = {"env": CATCH, "n_steps": 32, "num_envs": 2, "batch_size": 32, "n_epochs": 3,
             "steps": 1000, "seeds": seeds, "plasticity": list(plasticity), **options}  # fmt: skip
    config = build_config("ppo", given=given)
    envs = make_vec(config.env, len(seeds) * 2, schedule_seeds=seeds, **config.env_args)
    space = envs.single_observation_space, envs.single_action_space
    agent = PPO(config, *space, tuple(seeds), dtype=torch.float64)
    agent.start(envs.reset(seed=[lane for s in seeds for lane in environment_seeds(s, 2)])[0])
    return agent, envs, Episodes(len(seeds), 2)


LISTS = [
    ["layer-norm", "cbp:rate=0.02,maturity=5"],
    ["crelu", "redo:threshold=0.5,every=5", "l2-init:strength=1e-3"],
    ["weight-norm", "snr:percentile=0.6,initial=1,every=5,check=2"],
    ["injection:every=8", "regrama:threshold=0.7,every=5,batches=3", "spectral"],
    ["simba:version=2", "head-reset:every=9"],
    ["infer:heads=3,every=4", "parseval", "shrink-perturb:every=5"],
]


@pytest.mark.parametrize("trunk", ["shared", "separate"])
@pytest.mark.parametrize("plasticity", LISTS, ids=" ".join)
def test_a_seed_alone_equals_the_seed_among_three(plasticity, trunk):
    options = {"trunk": trunk, "net_arch": (16,)}
    together, envs3, episodes3 = agent_of((5, 7, 3), plasticity, **options)
    alone, envs1, episodes1 = agent_of((7,), plasticity, **options)
    first = [p.detach().clone() for p in alone.net.parameters()]
    for a, b in zip(first, together.net.parameters(), strict=True):
        assert torch.equal(a[0], b[1])
    alone.collect(envs1, episodes1)
    together.collect(envs3, episodes3)
    assert torch.equal(alone.observations[0], together.observations[1])
    assert alone.observations.dtype == torch.uint8
    torch.testing.assert_close(alone.outputs[0], together.outputs[1], rtol=0, atol=1e-12)
    for agent in (alone, together):
        agent.update(0.0)
        measured = agent.measure()
        assert all(np.isfinite(np.asarray(v)).all() for v in measured.values())
        assert ("trunk/0/dead_fraction" in measured) == (trunk == "shared")
        assert ("policy/0/dead_fraction" in measured) == (trunk == "separate")
    for a, b, old in zip(alone.net.parameters(), together.net.parameters(), first, strict=True):
        torch.testing.assert_close(a[0], b[1], rtol=0, atol=1e-9)
        assert not torch.equal(a, old)
    counts = [agent.handle.counts() for agent in (alone, together)]
    for name, count in counts[0].items():
        assert count[0] == counts[1][name][1]


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_state_continues_bit_for_bit(trunk):
    methods = ["crelu", "cbp:rate=0.02,maturity=5", "injection:every=9"]
    agent, envs, episodes = agent_of((7, 8), methods, trunk=trunk)
    for _ in range(2):
        agent.collect(envs, episodes)
        agent.update(0.0)
    other, _, _ = agent_of((1, 8), methods, trunk=trunk)
    for copy in range(2):
        other.load_state(copy, agent.state(copy))
    x = torch.randint(0, 256, (2, 64, 1, 10, 10), dtype=torch.uint8)
    values = agent.values(x)
    actions = torch.randint(0, 3, (2, 64, 1))
    data = Batch(x, actions, -values.abs() - 1, values, values, values)
    for each in (agent, other):
        each.learn(data, torch.from_numpy(each.minibatch_order.permutations(64, 3)))
    for copy in range(2):
        assert same(agent.state(copy), other.state(copy))


def test_rewards_are_clipped_for_learning_and_raw_in_the_log():
    agent, envs, episodes = agent_of((0,), reward_clip="0.25")
    agent.collect(envs, episodes)
    assert set(np.unique(agent.rewards)) == {-0.25, 0.0, 0.25}
    assert {e.ret for e in episodes.take(0)} == {-1.0, 1.0}


def test_a_time_limit_is_bootstrapped_with_the_value_of_the_last_image():
    agent, envs, episodes = agent_of((0, 1), env_args={"max_episode_steps": 4}, gamma=0.9)
    agent.collect(envs, episodes)
    assert agent.ends[3::4].all() and agent.ends.sum() == 4 * 8
    seeds = [lane for s in (0, 1) for lane in environment_seeds(s, 2)]
    for lane, seed in enumerate(seeds):
        game = Catch()
        game.reset(seed=seed)
        for t in range(32):
            image = game.step(agent.actions[lane // 2, t, lane % 2, 0])[0]
            expected = 0.0
            if t % 4 == 3:
                both = torch.from_numpy(np.stack([image[None]] * 2))
                expected = 0.9 * float(agent.values(both)[lane // 2, 0])
                game.reset()
            assert agent.rewards[t, lane] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("loss", ["mse", "hl-gauss:low=-2,high=2", "quantile"])
def test_values_of_a_shared_trunk_are_those_of_the_rollout(loss):
    agent, envs, episodes = agent_of((0, 1), value_loss=loss)
    agent.collect(envs, episodes)
    agent.update(0.0)
    agent.collect(envs, episodes)
    ours = agent.codec.decode(agent.value_outputs.flatten(1, 2))
    theirs = agent.values(agent.observations.flatten(1, 2))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_shared_trunk_on_flat_observations_learns_what_autograd_says():
    """The gradient of policy and value side together, through both heads."""
    agent, _, _ = agent_of((0, 1), env="CartPole-v1", trunk="shared", net_arch=(8,), ent_coef=0.1)
    x, actions = torch.randn(2, 32, 4).double(), torch.randint(0, 2, (2, 32, 1))
    old, values = -torch.rand(2, 32).double(), torch.randn(2, 32).double()
    agent._gradients(Batch(x, actions, old, values, values.flip(1), values + 1))
    ours = [p.grad.clone() for p in agent.net.parameters()]
    policy, value = agent.net(x)
    log_p = policy.log_softmax(-1)
    ratio = (log_p.gather(-1, actions)[..., 0] - old).exp()
    gain = torch.minimum(ratio * values.flip(1), ratio.clamp(0.8, 1.2) * values.flip(1))
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = 0.5 * (value[..., 0] - values - 1).square() - gain - 0.1 * entropy
    expected = torch.autograd.grad(loss.mean(-1).sum(), list(agent.net.parameters()))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_normalised_observations_are_refused_on_images():
    with pytest.raises(ValueError, match="leave norm_obs off") as error:
        agent_of((0,), norm_obs=True)
    assert "\n" not in str(error.value)


def test_ppo_learns_a_pixel_game(tmp_path, monkeypatch):
    """Catch (1 or -1 an episode, random play -0.6): to nearly always catching."""
    monkeypatch.chdir(Path(__file__).parents[1])  # workers import the game from here
    config = build_config(
        "ppo",
        given={"env": CATCH, "steps": 20_480, "n_steps": 64, "num_envs": 8, "batch_size": 128,
               "n_epochs": 8, "learning_rate": 2e-3, "lr_schedule": "linear",
               "run_dir": str(tmp_path / "run")},
    )  # fmt: skip
    out = io.StringIO()
    trained, status = run.train(config, out)
    assert status == 0, out.getvalue()
    rows = np.loadtxt(trained.path / "seed-0" / "episodes.csv", delimiter=",", skiprows=1)
    assert rows[:50, 2].mean() < 0 < 0.8 < rows[-100:, 2].mean()
    (result,) = evaluate(trained, episodes=20)
    assert np.mean(result.returns) >= 0.9
    policy = load(trained)
    assert policy.act(np.zeros((1, 10, 10), np.uint8)).shape == (1,)
    assert policy.act(np.zeros((5, 1, 10, 10), np.uint8)).shape == (5, 1)
