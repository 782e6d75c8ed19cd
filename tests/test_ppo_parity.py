"""One PPO update is SB3's: same weights, rollout and order of minibatches, weight by weight."""

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import stable_baselines3.common.policies
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import configure

from perennial.agents.config import build_config
from perennial.agents.ppo import PPO, Batch

STEPS, ENVS, BATCH = 128, 2, 32
OPTIONS = {
    "plain": {},
    "value clipping, entropy, batch norm off": {
        "clip_range_vf": 0.05,
        "ent_coef": 0.01,
        "advantage_norm": "none",
        "max_grad_norm": 0.1,
    },
    "kl stop": {"target_kl": 0.003, "learning_rate": 1e-3},
    "discrete actions": {"env": "CartPole-v1", "ent_coef": 0.01},
    "linear rate, tanh": {"lr_schedule": "linear", "activation": "tanh", "clip_range": 0.05},
}
NAMES = {
    "policy.0": "mlp_extractor.policy_net.0",
    "policy.2": "mlp_extractor.policy_net.2",
    "policy.4": "action_net",
    "value.0": "mlp_extractor.value_net.0",
    "value.2": "mlp_extractor.value_net.2",
    "value.4": "value_net",
}


def sb3_name(name: str) -> str:
    if name == "distribution.log_std":
        return "log_std"
    layer, _, kind = name.rpartition(".")
    return f"{NAMES[layer]}.{kind}"


def pair(options: dict, dtype: torch.dtype):
    """SB3's PPO with a filled rollout buffer, and ours with the same weights."""
    config = build_config(
        "ppo",
        given={
            "env": "Pendulum-v1",
            "n_steps": STEPS,
            "num_envs": ENVS,
            "batch_size": BATCH,
            "net_arch": (64, 64),
            "steps": 10_000,
            **options,
        },
    )
    activation = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[config.activation]
    rate = config.learning_rate
    theirs = stable_baselines3.PPO(
        "MlpPolicy",
        stable_baselines3.common.env_util.make_vec_env(config.env, ENVS, seed=0),
        learning_rate=(lambda left: rate * left) if config.lr_schedule == "linear" else rate,
        n_steps=STEPS,
        batch_size=BATCH,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        clip_range_vf=config.clip_range_vf,
        normalize_advantage=config.advantage_norm == "minibatch",
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm,
        target_kl=config.target_kl,
        seed=0,
        policy_kwargs={"net_arch": [64, 64], "activation_fn": activation},
        device="cpu",
    )
    theirs.policy.to(dtype)
    _, callback = theirs._setup_learn(10_000)
    theirs.set_logger(configure(None, []))
    assert theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, STEPS)
    theirs._update_current_progress_remaining(STEPS * ENVS, 10_000)
    ours = PPO(
        config,
        theirs.observation_space,
        theirs.action_space,
        seeds=(0,),
        dtype=dtype,  # type: ignore[arg-type]
    )
    weights = theirs.policy.state_dict()
    with torch.no_grad():
        for name, parameter in ours.net.named_parameters():
            parameter[0].copy_(weights[sb3_name(name)])
    return theirs, ours


def update_both(theirs, ours, dtype: torch.dtype):
    """Run one update on either side; returns our losses and SB3's logged values."""
    buffer = theirs.rollout_buffer

    def rows(x: np.ndarray) -> torch.Tensor:
        flat = buffer.swap_and_flatten(x.copy())
        return torch.as_tensor(flat).to(dtype)

    n = STEPS * ENVS
    data = [rows(buffer.observations)[None], rows(buffer.actions)[None]]
    data += [
        rows(x)[:, 0][None]
        for x in (buffer.log_probs, buffer.values, buffer.advantages, buffer.returns)
    ]
    np.random.seed(7)
    order = np.stack([np.random.permutation(n) for _ in range(ours.config.n_epochs)])[None]
    np.random.seed(7)
    theirs.train()
    losses = ours.learn(Batch(*data), torch.from_numpy(order), progress=n / 10_000)
    return losses, theirs.logger.name_to_value


def compare(theirs, ours, losses, logged, tolerance: float) -> None:
    weights = theirs.policy.state_dict()
    for name, parameter in ours.net.named_parameters():
        expected = weights[sb3_name(name)]
        assert (parameter[0] - expected).abs().max().item() <= tolerance, name
    for key in (
        "policy_gradient_loss",
        "value_loss",
        "entropy_loss",
        "approx_kl",
        "clip_fraction",
        "loss",
        "learning_rate",
        *(["std"] if "std" in losses else []),
    ):
        assert losses[key][0] == pytest.approx(logged[f"train/{key}"], abs=max(tolerance, 1e-12)), (
            key
        )


@pytest.fixture
def double_sb3(monkeypatch):
    """SB3's PPO in float64: its two casts to float32 are all that stands in the way."""
    preprocess = stable_baselines3.common.policies.preprocess_obs

    def doubled(obs, space, normalize_images=True):
        return preprocess(obs, space, normalize_images).double()

    monkeypatch.setattr(stable_baselines3.common.policies, "preprocess_obs", doubled)
    monkeypatch.setattr(
        RolloutBuffer,
        "to_torch",
        lambda self, array, copy=True: torch.as_tensor(np.array(array)).double(),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_update_equals_sb3_in_float64(options, double_sb3):
    """Ten epochs, weights and losses to 1e-10."""
    theirs, ours = pair(options, torch.float64)
    compare(theirs, ours, *update_both(theirs, ours, torch.float64), tolerance=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_update_equals_sb3_in_float32(options):
    """The same without patches, to 1e-5."""
    theirs, ours = pair(options, torch.float32)
    compare(theirs, ours, *update_both(theirs, ours, torch.float32), tolerance=1e-5)


def test_advantages_equal_sb3():
    """GAE over ends of episodes, against SB3's buffer."""
    rng = np.random.default_rng(0)
    buffer = RolloutBuffer(
        50,
        gym.spaces.Box(-1, 1, (1,)),
        gym.spaces.Box(-1, 1, (1,)),
        n_envs=3,
        gamma=0.97,
        gae_lambda=0.9,
    )
    rewards, values = rng.normal(size=(2, 50, 3)).astype(np.float32)
    ends = rng.random((50, 3)) < 0.1
    starts = np.concatenate([np.ones((1, 3), bool), ends[:-1]])
    for t in range(50):
        buffer.add(
            np.zeros((3, 1)),
            np.zeros((3, 1)),
            rewards[t],
            starts[t],
            torch.from_numpy(values[t]),
            torch.zeros(3),
        )
    last = rng.normal(size=3).astype(np.float32)
    buffer.compute_returns_and_advantage(torch.from_numpy(last), ends[-1])
    from perennial.agents.returns import generalised_advantages

    ours = generalised_advantages(rewards, values, last, ends, 0.97, 0.9)
    np.testing.assert_allclose(ours, buffer.advantages, atol=2e-5)
