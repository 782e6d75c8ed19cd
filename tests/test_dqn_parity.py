"""DQN's updates are Stable-Baselines3's, quantile values are sb3-contrib's QR-DQN, on vectors and
pixels; so are epsilon, and when it learns and copies its targets."""

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import stable_baselines3.common.policies
import torch
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from perennial.agents.config import build_config
from perennial.agents.dqn import DQN
from perennial.agents.replay import Sample
from perennial.plasticity.copies import BatchedConv2d, BatchedLinear
from tests.test_dqn import Play

BATCH, STEPS = 32, 6
QUANTILES = 8  # their midpoints are float32, which holds eighths exactly


class Noise(gym.Env):
    """Pixels that the Nature CNN can just read, 5 actions."""

    observation_space = gym.spaces.Box(0, 255, (2, 36, 40), np.uint8)
    action_space = gym.spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


if "tests/Noise-v0" not in gym.registry:
    gym.register("tests/Noise-v0", entry_point=Noise)

SGD = {"learning_rate": 1e-3, "adam_eps": 1e-3}
CASES = {
    "plain": {"env": "CartPole-v1", "net_arch": (32, 32)},
    "clipped": {"env": "CartPole-v1", "net_arch": (32, 32), "max_grad_norm": 0.05,
                "activation": "tanh", "tau": 0.3},
    "pixels": {"env": "tests/Noise-v0"},
    # QR-DQN brings its own epsilon for Adam.
    "quantile": {"env": "CartPole-v1", "net_arch": (32, 32), "max_grad_norm": "none",
                 "adam_eps": 0.01 / BATCH,
                 "value_loss": f"quantile:quantiles={QUANTILES}"},
}  # fmt: skip


def pair(options: dict, dtype: torch.dtype):
    """SB3's agent and ours with the same weights."""
    given = {"batch_size": BATCH, "steps": 10_000, "buffer_size": 1000, **SGD, **options}
    config = build_config("dqn", given=given)
    policy = {"optimizer_kwargs": {"eps": config.adam_eps}}
    if config.net_arch is not None:
        policy |= {"net_arch": list(config.net_arch),
                   "activation_fn": {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[
                       config.activation]}  # fmt: skip
    kind = stable_baselines3.DQN
    if config.value_loss != "mse":
        kind, policy = sb3_contrib.QRDQN, policy | {"n_quantiles": QUANTILES}
    theirs = kind(
        "CnnPolicy" if config.net_arch is None else "MlpPolicy",
        config.env, learning_rate=config.learning_rate, batch_size=BATCH, seed=0, device="cpu",
        buffer_size=1000, policy_kwargs=policy, tau=config.tau, target_update_interval=1,
        max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    theirs.set_logger(configure(None, []))
    theirs.policy.to(dtype)
    ours = DQN(config, theirs.observation_space, theirs.action_space, seeds=(0,), dtype=dtype)
    with torch.no_grad():
        for net, other in nets(theirs, ours):
            for mine, value in weights(net, other):
                mine.copy_(value)
    return theirs, ours


def nets(theirs, ours):
    names = ("quantile_net", "quantile_net_target")
    if isinstance(theirs, stable_baselines3.DQN):
        names = ("q_net", "q_net_target")
    return zip((ours.net, ours.targets), (getattr(theirs, n) for n in names), strict=True)


def weights(ours: torch.nn.Module, theirs: torch.nn.Module):
    """Pairs of parameters; QR-DQN's last layer orders its outputs by quantile, ours by action."""
    kinds = (BatchedLinear, BatchedConv2d)
    layers = [m for m in ours.modules() if isinstance(m, kinds)]
    others = [m for m in theirs.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    for layer, other in zip(layers, others, strict=True):
        for name in ("weight", "bias"):
            value = getattr(other, name).data
            if other is others[-1] and hasattr(theirs, "n_quantiles"):
                value = value.unflatten(0, (QUANTILES, -1)).transpose(0, 1).flatten(0, 1)
            yield getattr(layer, name)[0], value


def train_both(theirs, ours, dtype, monkeypatch):
    """STEPS gradient steps on the same batches, then the targets follow; our mean loss."""
    rng = np.random.default_rng(0)
    space, batches = theirs.observation_space, []
    for _ in range(STEPS):
        shape = (2, BATCH, *space.shape)
        if space.dtype == np.uint8:
            obs, following = rng.integers(0, 256, shape, np.uint8)
        else:
            obs, following = rng.normal(size=shape).astype(np.float32)
        actions, rewards = rng.integers(0, theirs.action_space.n, BATCH), rng.normal(size=BATCH)
        batches.append((obs, actions, 3 * rewards, rng.random(BATCH) < 0.2, following))
    queue = iter(batches)

    def sample(size, env=None):
        obs, actions, rewards, done, following = next(queue)
        kinds = (torch.uint8 if obs.dtype == np.uint8 else dtype, torch.int64, dtype, dtype)
        parts = (obs, actions[:, None], done[:, None], rewards[:, None])
        obs, actions, done, rewards = (
            torch.as_tensor(x).to(k) for x, k in zip(parts, kinds, strict=True)
        )
        following = torch.as_tensor(following).to(kinds[0])
        return ReplayBufferSamples(obs, actions, following, done, rewards)

    monkeypatch.setattr(theirs.replay_buffer, "sample", sample)
    theirs.train(gradient_steps=STEPS, batch_size=BATCH)
    theirs._on_step()
    for obs, actions, rewards, done, following in batches:
        discounts = ours.config.gamma * (1.0 - done)
        kind = obs.dtype if obs.dtype == np.uint8 else np.float64
        parts = (obs.astype(kind), actions, rewards, discounts, following.astype(kind))
        ours.learn(Sample(*(x[None] for x in parts)))
    ours._follow()
    return ours._means(0)["loss"][0], theirs.logger.name_to_value["train/loss"]


def compare(theirs, ours, losses, tolerance: float) -> None:
    assert losses[0] == pytest.approx(losses[1], abs=max(tolerance, 1e-6))
    for net, other in nets(theirs, ours):
        for mine, value in weights(net, other):
            assert (mine - value).abs().max() <= tolerance
    moved = [
        (a - b).abs().max()
        for a, b in zip(ours.net.parameters(), ours.targets.parameters(), strict=True)
    ]
    assert (max(moved) > 1e-4) == (ours.config.tau < 1)


@pytest.fixture
def double_sb3(monkeypatch):
    preprocess = stable_baselines3.common.policies.preprocess_obs
    monkeypatch.setattr(
        stable_baselines3.common.policies,
        "preprocess_obs",
        lambda obs, space, normalize_images=True: (
            obs.double() / 255
            if obs.dtype == torch.uint8
            else preprocess(obs, space, normalize_images).double()
        ),
    )
    monkeypatch.setattr(
        ReplayBuffer, "to_torch", lambda self, x, copy=True: torch.as_tensor(np.array(x)).double()
    )


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_updates_equal_sb3_in_float64(options, double_sb3, monkeypatch):
    theirs, ours = pair(options, torch.float64)
    compare(theirs, ours, train_both(theirs, ours, torch.float64, monkeypatch), 1e-10)
    if options.get("max_grad_norm") == 0.05:
        assert ours.clip.scale[0] < 0.5


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_updates_equal_sb3_in_float32(options, monkeypatch):
    theirs, ours = pair(options, torch.float32)
    compare(theirs, ours, train_both(theirs, ours, torch.float32, monkeypatch), 2e-5)


def test_epsilon_equals_sb3():
    theirs, ours = pair({**CASES["plain"], "exploration_fraction": 0.3}, torch.float32)
    theirs.exploration_schedule = type(theirs.exploration_schedule)(1.0, 0.05, 0.3)
    for step in (0, 1, 1499, 2999, 3000, 3001, 9999):
        expected = theirs.exploration_schedule(1 - step / 10_000)
        assert ours.explore.epsilon(step)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("lanes, interval", [(1, 7), (2, 7), (3, 2)])
def test_it_learns_and_copies_targets_when_sb3_does(lanes, interval, monkeypatch):
    options = {"learning_starts": 100, "train_freq": 3, "gradient_steps": 2, "batch_size": 4,
               "target_update_interval": interval}  # fmt: skip
    events: dict[str, list] = {"theirs": [], "ours": []}
    theirs = stable_baselines3.DQN(
        "MlpPolicy", make_vec_env("CartPole-v1", lanes), device="cpu", buffer_size=500, **options
    )
    import stable_baselines3.dqn.dqn as module

    follow = module.polyak_update
    monkeypatch.setattr(
        module,
        "polyak_update",
        lambda *a: (follow(*a), a[2] == 1.0 and events["theirs"].append(theirs._n_updates)),
    )
    play = Play({"env": "CartPole-v1", "num_envs": lanes, "steps": 100_000, "buffer_size": 500,
                 "net_arch": (8,), **options})  # fmt: skip
    own = play.agent._follow
    monkeypatch.setattr(
        play.agent, "_follow", lambda: (own(), events["ours"].append(play.agent.updates))
    )
    play.advance()
    theirs.learn(play.episodes.env_steps)
    assert theirs.num_timesteps == play.episodes.env_steps
    assert theirs._n_updates == play.agent.updates > 100
    # SB3 copies twice: parameters, then running statistics.
    assert events["theirs"][::2] == events["ours"] and len(set(events["ours"])) > 30
