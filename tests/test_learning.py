"""Agents learn: returns on tiny problems rise to what they should."""

import io

import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.evaluation import evaluate_policy

from perennial.agents import load, run
from perennial.agents.config import build_config
from perennial.agents.evaluate import evaluate


def test_ppo_learns_with_discrete_actions(tmp_path):
    """CartPole (1 a step, at most 500), actions by number, values by HL-Gauss."""
    config = build_config(
        "ppo",
        given={"env": "CartPole-v1", "steps": 24_576, "n_steps": 1024, "batch_size": 64,
               "learning_rate": 1e-3, "net_arch": (32, 32), "run_dir": str(tmp_path / "run"),
               "value_loss": "hl-gauss:low=0,high=110"},
    )  # fmt: skip
    out = io.StringIO()
    trained, status = run.train(config, out)
    assert status == 0, out.getvalue()
    rows = np.loadtxt(trained.path / "seed-0" / "episodes.csv", delimiter=",", skiprows=1)
    assert rows[:20, 2].mean() < 60 < 150 < rows[-20:, 2].mean()
    (result,) = evaluate(trained, episodes=3)
    assert np.mean(result.returns) > 200
    assert load(trained).act(np.zeros(4)) in (0, 1)


def test_ppo_learns_to_balance_a_pole(tmp_path):
    """InvertedPendulum (continuous force, 1 a step, at most 1000): from about 10 to hundreds."""
    config = build_config(
        "ppo",
        given={"env": "InvertedPendulum-v5", "steps": 36_864, "n_steps": 1024, "batch_size": 64,
               "learning_rate": 1e-3, "net_arch": (64, 64), "activation": "tanh", "norm_obs": True,
               "seeds": 2, "run_dir": str(tmp_path / "run"), 
               "plasticity": ["cbp:rate=1e-3,maturity=200", "l2:strength=1e-4"]},
    )  # fmt: skip
    out = io.StringIO()
    trained, status = run.train(config, out)
    assert status == 0, out.getvalue()
    for seed in (0, 1):
        rows = np.loadtxt(trained.path / f"seed-{seed}" / "episodes.csv", delimiter=",", skiprows=1)
        assert rows[:20, 2].mean() < 60 < 300 < rows[-20:, 2].mean()
    for result in evaluate(trained, episodes=3):
        assert np.mean(result.returns) > 500
    policy = load(trained, seed=1)
    assert policy.act(np.zeros(4)).shape == (1,) and policy.act(np.zeros((5, 4))).shape == (5, 1)


@pytest.mark.slow
def test_ppo_with_discrete_actions_reaches_what_sb3_reaches(tmp_path):
    """CartPole with the options of SB3's zoo: both end at (nearly) 500."""
    options = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8}
    config = build_config(
        "ppo",
        given={"env": "CartPole-v1", "steps": 81_920, "num_envs": 8, "learning_rate": 1e-3,
               "lr_schedule": "linear", "net_arch": (64, 64), "activation": "tanh", "seeds": 2,
               "run_dir": str(tmp_path / "run"), **options},
    )  # fmt: skip
    out = io.StringIO()
    trained, status = run.train(config, out)
    assert status == 0, out.getvalue()
    ours = [float(np.mean(result.returns)) for result in evaluate(trained, episodes=10)]
    torch.set_num_threads(1)
    envs = stable_baselines3.common.env_util.make_vec_env("CartPole-v1", 8, seed=0)
    theirs = stable_baselines3.PPO(
        "MlpPolicy", envs, learning_rate=lambda left: 1e-3 * left, seed=0, device="cpu", **options
    )
    theirs.learn(81_920)
    reached, _ = evaluate_policy(theirs, envs, n_eval_episodes=10)
    assert min(ours) >= 0.95 * reached > 400
