"""SAC: one update is Stable-Baselines3's, gradients are autograd's, resume is exact."""

import itertools

import numpy as np
import pytest
import stable_baselines3
import stable_baselines3.common.policies
import torch
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from perennial.agents.checkpoint import checkpoints, read_checkpoint
from perennial.agents.config import build_config
from perennial.agents.critics import Soft, TwinCritics, actor_loss, critic_loss
from perennial.agents.loop import train_group
from perennial.agents.replay import Sample
from perennial.agents.sac import LOSSES, SAC
from perennial.agents.squashed import SquashedGaussian
from perennial.agents.temperature import Temperature, temperature_loss
from perennial.plasticity import kernels
from tests.test_checkpoint import same
from tests.test_exactness import scalars

BATCH, STEPS = 32, 6
OPTIONS = {"plain": {}, "fixed temperature": {"ent_coef": "0.25", "tau": 0.5, "activation": "tanh"}}


def pair(options: dict, dtype: torch.dtype):
    """SB3's SAC and ours with the same weights."""
    config = build_config(
        "sac",
        given={"env": "Pendulum-v1", "batch_size": BATCH, "net_arch": (32, 32), "steps": 10_000,
               "buffer_size": 1000, **options},
    )  # fmt: skip
    ent_coef = config.ent_coef if config.learns_ent_coef else config.first_ent_coef
    activation = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[config.activation]
    theirs = stable_baselines3.SAC(
        "MlpPolicy", "Pendulum-v1", batch_size=BATCH, ent_coef=ent_coef, tau=config.tau, seed=0,
        policy_kwargs={"net_arch": [32, 32], "activation_fn": activation}, device="cpu",
        buffer_size=1000,
    )  # fmt: skip
    theirs.set_logger(configure(None, []))
    theirs.policy.to(dtype)
    if config.learns_ent_coef:
        theirs.log_ent_coef.data = theirs.log_ent_coef.data.to(dtype)
    else:
        theirs.ent_coef_tensor = theirs.ent_coef_tensor.to(dtype)
    ours = SAC(config, theirs.observation_space, theirs.action_space, seeds=(0,), dtype=dtype)
    with torch.no_grad():
        for name, parameter in ours.actor.named_parameters():
            parameter[0].copy_(sb3_actor(theirs, name))
        for net, other in (
            (ours.critics.net, theirs.critic),
            (ours.critics.targets, theirs.critic_target),
        ):
            for name, parameter in net.named_parameters():
                for i in range(2):
                    parameter[i].copy_(other.state_dict()[f"qf{i}.{name}"])
    return theirs, ours


def sb3_actor(theirs, name: str) -> torch.Tensor:
    weights = theirs.actor.state_dict()
    layer, _, kind = name.rpartition(".")
    if layer == "4":  # one output layer here, two there
        return torch.cat([weights[f"mu.{kind}"], weights[f"log_std.{kind}"]])
    return weights[f"latent_pi.{layer}.{kind}"]


def train_both(theirs, ours, dtype: torch.dtype, monkeypatch):
    """STEPS gradient steps on the same batches with the same noise; our last losses."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(STEPS):
        # SB3 casts observations to float32 on the way.
        obs, following = rng.normal(size=(2, BATCH, 3)).astype(np.float32).astype(np.float64)
        actions, rewards = rng.uniform(-1, 1, (BATCH, 1)), rng.normal(size=BATCH)
        done = rng.random(BATCH) < 0.2
        batches.append((obs, actions, rewards, done, following))
    queue = iter(batches)

    def sample(size, env=None):
        obs, actions, rewards, done, following = next(queue)
        parts = (obs, actions, following, done[:, None], rewards[:, None])
        return ReplayBufferSamples(*(torch.as_tensor(x).to(dtype) for x in parts))

    monkeypatch.setattr(theirs.replay_buffer, "sample", sample)
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(3)
        noise = [
            torch.normal(torch.zeros(BATCH, 1), torch.ones(BATCH, 1)) for _ in range(2 * STEPS)
        ]
        torch.manual_seed(3)
        theirs.train(gradient_steps=STEPS, batch_size=BATCH)
    finally:
        torch.set_default_dtype(torch.float32)
    losses = {}
    for k, (obs, actions, rewards, done, following) in enumerate(batches):
        discounts = ours.config.gamma * (1.0 - done)
        parts = (obs, actions, rewards, discounts, following)
        both = torch.stack(noise[2 * k : 2 * k + 2])[None]
        values = ours.learn(Sample(*(x[None] for x in parts)), both)
        step = dict(zip(LOSSES, values, strict=True))
        losses = {n: losses.get(n, 0.0) + v.item() / STEPS for n, v in step.items()}
    return losses, theirs.logger.name_to_value


def compare(theirs, ours, losses, logged, tolerance: float) -> None:
    for name, parameter in ours.actor.named_parameters():
        assert (parameter[0] - sb3_actor(theirs, name)).abs().max() <= tolerance, name
    for net, other in (
        (ours.critics.net, theirs.critic),
        (ours.critics.targets, theirs.critic_target),
    ):
        for name, parameter in net.named_parameters():
            for i in range(2):
                expected = other.state_dict()[f"qf{i}.{name}"]
                assert (parameter[i] - expected).abs().max() <= tolerance, name
    for name in ("actor_loss", "critic_loss", "ent_coef"):
        assert losses[name] == pytest.approx(logged[f"train/{name}"], abs=max(tolerance, 1e-9))
    if ours.config.learns_ent_coef:
        assert (ours.log_ent_coef[0] - theirs.log_ent_coef).abs().max() <= tolerance


@pytest.fixture
def double_sb3(monkeypatch):
    preprocess = stable_baselines3.common.policies.preprocess_obs
    monkeypatch.setattr(
        stable_baselines3.common.policies,
        "preprocess_obs",
        lambda obs, space, normalize_images=True: preprocess(obs, space, normalize_images).double(),
    )
    monkeypatch.setattr(
        ReplayBuffer, "to_torch", lambda self, x, copy=True: torch.as_tensor(np.array(x)).double()
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_updates_equal_sb3_in_float64(options, double_sb3, monkeypatch):
    theirs, ours = pair(options, torch.float64)
    compare(theirs, ours, *train_both(theirs, ours, torch.float64, monkeypatch), 1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_updates_equal_sb3_in_float32(options, monkeypatch):
    theirs, ours = pair(options, torch.float32)
    compare(theirs, ours, *train_both(theirs, ours, torch.float32, monkeypatch), 2e-5)


def test_squashed_gradients_equal_autograd():
    torch.manual_seed(0)
    head = SquashedGaussian(3)
    output = (2 * torch.randn(2, 20, 6)).double()
    output[0, 0, 4], output[1, 3, 5] = 2.5, -21.0  # clipped deviations
    output.requires_grad_()
    noise, direction = torch.randn(2, 20, 3).double(), torch.randn(2, 20, 3).double()
    ent_coef = torch.tensor([0.3, 0.7]).double()
    policy = head.sample(output, noise)
    normal = torch.distributions.Normal(output[..., :3], output[..., 3:].clamp(-20, 2).exp())
    raw = normal.mean + normal.stddev * noise
    slope = torch.log(1 - torch.tanh(raw) ** 2 + 1e-6).sum(-1)
    assert torch.allclose(policy.log_prob, normal.log_prob(raw).sum(-1) - slope)
    loss = (ent_coef[:, None] * policy.log_prob).sum() - (direction * policy.actions).sum()
    (expected,) = torch.autograd.grad(loss, output)
    ours = head.gradient(policy, direction, ent_coef)
    assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("loops", [True, False])
def test_laid_out_steps_read_what_lies_there_when_they_are_called(loops, monkeypatch):
    if not loops:
        monkeypatch.setattr(kernels, "ready", lambda *_: False)
    torch.manual_seed(0)
    head, rows = SquashedGaussian(3), torch.zeros(2, 20, 7).double()
    output, noise, found = (torch.zeros(2, 20, n).double() for n in (6, 3, 6))
    twice, ent_coef = torch.zeros(2, 2, 20, 3).double(), torch.tensor([0.3, 0.7]).double()
    policy = head.space(rows[..., 4:], rows.new_zeros(2, 20))
    sample = head.sample_later(output, noise, policy)
    slope = head.gradient_later(policy, twice, ent_coef, found)
    for _ in range(2):
        output.copy_(3 * torch.randn(2, 20, 6))
        output[0, 0, 4], output[1, 3, 5] = 2.5, -21.0  # clipped deviations
        noise.copy_(torch.randn(2, 20, 3))
        twice.copy_(torch.randn(2, 2, 20, 3))
        sample()
        slope()
        expected = head.sample(output, noise)
        for name, value in expected._asdict().items():
            assert torch.allclose(getattr(policy, name), value, rtol=0, atol=1e-8), name
        assert (rows[..., 4:] == policy.actions).all() and not rows[..., :4].any()
        gradient = head.gradient(expected, twice.sum(1), ent_coef) / 20
        assert torch.allclose(found, gradient, rtol=0, atol=1e-8)


@pytest.mark.parametrize("loops", [True, False])
def test_losses_into_memory_are_the_pure_functions(loops, monkeypatch):
    if not loops:
        monkeypatch.setattr(kernels, "ready", lambda *_: False)
    config = build_config("sac", given={"env": "Pendulum-v1", "net_arch": (8,)})
    torch.manual_seed(0)
    rows = [torch.randn(3, 9).double() for _ in range(4)]
    rewards, discounts, log_prob, next_log_prob = rows
    outputs, future = (torch.randn(3, 2, 9, 1).double() for _ in range(2))
    outputs[1, 0, 4] = outputs[1, 1, 4]  # equal twins share
    critics = TwinCritics(config, (3, 1), (0, 1, 2), rewards.new_zeros(()), False)
    temperature = Temperature(config, 3, -1.0, "cpu", torch.float64)
    with torch.no_grad():
        temperature.log.copy_(torch.randn(3, 1))
        log = temperature.log.clone()
        loss, ent_coef = rewards.new_zeros(3), rewards.new_zeros(3)
        temperature.learn_later(log_prob, ent_coef, loss)()
    found = temperature_loss(log, log_prob, -1.0)
    assert torch.allclose(ent_coef, log[:, 0].exp(), rtol=1e-12)
    assert torch.allclose(loss, found.value, rtol=1e-12)
    assert torch.allclose(temperature.log.grad, found.gradient, rtol=1e-12)
    assert not torch.equal(temperature.log, log)

    gradient = torch.zeros_like(outputs)
    soft = Soft(rewards, discounts, ent_coef, next_log_prob)
    for step, expected in (
        (critics.errors_later(outputs, future, soft, loss, gradient),
         critic_loss(critics.codec, outputs, future, soft)),
        (critics.lesser_later(outputs, ent_coef, log_prob, loss, gradient),
         actor_loss(critics.codec, outputs, ent_coef, log_prob)),
    ):  # fmt: skip
        step()
        assert torch.allclose(loss, expected.value, rtol=1e-12)
        assert torch.allclose(gradient, expected.gradient, rtol=1e-12)
    leaf = outputs.clone().requires_grad_()
    critic_loss(critics.codec, leaf, future, soft).value.sum().backward()
    expected = critic_loss(critics.codec, outputs, future, soft).gradient
    assert torch.allclose(leaf.grad, expected, rtol=1e-12)


@pytest.mark.parametrize("value_loss", ["mse", "hl-gauss", "two-hot", "c51", "quantile"])
def test_two_threads_and_seeds_in_company_change_nothing(value_loss):
    """Halves on two threads equal one; seed 7 alone equals seed 7 of three, in float64."""
    given = {"env": "Pendulum-v1", "batch_size": 16, "net_arch": (16, 16), "steps": 5000,
             "value_loss": value_loss, "buffer_size": 100,
             "plasticity": ["cbp:rate=0.01,maturity=3"]}  # fmt: skip
    config = build_config("sac", given=given)
    import gymnasium as gym

    env = gym.make("Pendulum-v1")
    agents = [
        SAC(config, env.observation_space, env.action_space, seeds, "cpu", threads, torch.float64)
        for seeds, threads in (((7,), 1), ((7,), 2), ((3, 7, 5), 1), ((3, 7, 5), 2))
    ]
    rng = np.random.default_rng(0)
    for _ in range(30):
        parts = [rng.normal(size=(1, 16, n)) for n in (3, 1, 3)]
        sample = Sample(parts[0], np.tanh(parts[1]), rng.normal(size=(1, 16)),
                        np.full((1, 16), 0.9), parts[2])  # fmt: skip
        noise = torch.from_numpy(rng.normal(size=(1, 2, 16, 1)))
        for agent in agents:
            copies = len(agent.seeds)
            several = Sample(*(np.repeat(x, copies, 0) for x in sample[:5]))
            agent.learn(several, noise.expand(copies, -1, -1, -1))
    for place, agent in ((0, agents[1]), (1, agents[2]), (1, agents[3])):
        for a, b in zip(agents[0].actor.parameters(), agent.actor.parameters(), strict=True):
            assert (a[0] - b[place]).abs().max() < 1e-9
        for a, b in zip(
            agents[0].critics.net.parameters(), agent.critics.net.parameters(), strict=True
        ):
            assert (a[0] - b[2 * place]).abs().max() < 1e-9
            assert (a[1] - b[2 * place + 1]).abs().max() < 1e-9
        assert agents[0].counts()["cbp"][0] == agent.counts()["cbp"][place] > 3


GROUP = {"env_args": {"change_every": 700, "max_episode_steps": 60}, "steps": 2000,
         "batch_size": 16, "net_arch": (16, 16), "buffer_size": 1500, "learning_starts": 100,
         "train_freq": 4, "n_step": 2, "num_envs": 2, "seeds": 2, "at_change": "per-task",
         "checkpoint_every": 1000, "metrics_every": 1000,
         "plasticity": ["cbp:rate=0.01,maturity=20"],
         "value_loss": "hl-gauss:low=-50,high=50"}  # fmt: skip


def train(folder, stopping=lambda: False):
    config = build_config("sac", given=GROUP)
    for seed in config.seeds:
        (folder / f"seed-{seed}").mkdir(parents=True, exist_ok=True)
    train_group(config, config.seeds, folder, stopping=stopping)


def test_stopped_anywhere_and_resumed_equals_unbroken(tmp_path):
    """Replay, streams, networks, environments and log, between two points of the log too."""
    train(tmp_path / "unbroken")
    for calls in (60, 190):
        count = itertools.count()
        train(tmp_path / "broken", lambda: next(count) >= calls)  # noqa: B023
    train(tmp_path / "broken")
    for seed in (0, 1):
        one, other = (tmp_path / name / f"seed-{seed}" for name in ("unbroken", "broken"))
        assert checkpoints(one)[-1] == checkpoints(other)[-1] == 2000
        assert same(read_checkpoint(one, 2000), read_checkpoint(other, 2000))
        assert (one / "episodes.csv").read_bytes() == (other / "episodes.csv").read_bytes()
        shown = scalars(one)
        assert shown == scalars(other)
        for tag in (
            "train/critic_loss",
            "plasticity/actor/dormant_fraction",
            "plasticity/critic2/dormant_fraction",
            "intervention/cbp/units_reset",
        ):
            assert shown[tag], tag


@pytest.mark.slow
def test_sac_learns_to_swing_up(tmp_path):
    """Pendulum: from about -1300 to what SB3 reaches with the same options, -200 or better."""
    from perennial.agents.evaluate import evaluate
    from perennial.agents.run import train as run_training

    config = build_config(
        "sac",
        given={"env": "Pendulum-v1", "steps": 8000, "learning_rate": 1e-3, "net_arch": (64, 64),
               "seeds": 2, "run_dir": str(tmp_path / "run")},
    )  # fmt: skip
    run, status = run_training(config)
    assert status == 0
    for result in evaluate(run, episodes=10):
        assert np.mean(result.returns) > -250
