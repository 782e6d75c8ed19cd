"""DQN as the command runs it: what it learns, and a killed run that goes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

import tests.tiny_games  # noqa: F401  # registers tests/Catch-v0
from perennial.agents.checkpoint import checkpoints, read_checkpoint
from perennial.agents.config import build_config
from perennial.agents.evaluate import evaluate
from perennial.agents.run import train as run_training
from tests.test_checkpoint import same
from tests.test_dqn import Play
from tests.test_exactness import command, finish, scalars

# rl-baselines3-zoo's settings for CartPole-v1.
CARTPOLE = {"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000,
            "learning_starts": 1000, "gamma": 0.99, "target_update_interval": 10,
            "train_freq": 256, "gradient_steps": 128, "exploration_fraction": 0.16,
            "exploration_final_eps": 0.04}  # fmt: skip
CATCH = {"learning_rate": 1e-3, "buffer_size": 20_000, "learning_starts": 500, "train_freq": 2,
         "target_update_interval": 200, "exploration_fraction": 0.4}  # fmt: skip
RAINBOW = {"double": True, "dueling": True, "n_step": 3, "prioritized_replay": True,
           "value_loss": "c51:low=-1,high=1,bins=21"}  # fmt: skip


def caught(play: Play, episodes: int = 60) -> float:
    """Mean return of the greedy policy on Catch."""
    seen, returns = play.envs.reset(seed=[5])[0], []
    while len(returns) < episodes:
        seen, rewards, ended, *_ = play.envs.step(play.agent.asked(play.agent.act(seen)))
        returns += rewards[ended].tolist()
    return float(np.mean(returns))


def test_rainbow_learns_a_tiny_pixel_game():
    """Everything at once: from about -0.6 to hardly a miss in 4000 steps."""
    play = Play({"env": "tests/Catch-v0", "steps": 4000, "net_arch": (64,), **CATCH, **RAINBOW,
                 "train_freq": 3, "target_update_interval": 60, "learning_rate": 2e-3})  # fmt: skip
    while play.episodes.env_steps < 4000:
        play.advance()
    assert caught(play) > 0.8


class SmallCNN(BaseFeaturesExtractor):
    """Our network for small images up to its first linear layer."""

    def __init__(self, space: gym.Space):
        super().__init__(space, features_dim=16 * 8 * 8)
        self.cnn = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Flatten()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cnn(x)


@pytest.mark.slow
def test_dqn_learns_a_tiny_pixel_game_as_sb3_does():
    given = {"env": "tests/Catch-v0", "steps": 12_000, "net_arch": (64,), **CATCH}
    play = Play(given)
    while play.episodes.env_steps < 12_000:
        play.advance()
    theirs = stable_baselines3.DQN(
        "CnnPolicy", "tests/Catch-v0", seed=0, device="cpu", **CATCH,
        policy_kwargs={"features_extractor_class": SmallCNN, "net_arch": [64]},
    ).learn(12_000)  # fmt: skip
    reached, _ = evaluate_policy(theirs, gym.make("tests/Catch-v0"), 60)
    assert caught(play) >= min(0.9, reached - 0.1) > 0.5


def balanced(folder: Path, **given) -> list[float]:
    """Mean greedy returns of seeds trained on CartPole, in order."""
    own = {"env": "CartPole-v1", "run_dir": str(folder), "metrics_every": 25_000}
    run, status = run_training(build_config("dqn", given={**own, **CARTPOLE, **given}))
    assert status == 0
    return sorted(float(np.mean(r.returns)) for r in evaluate(run, episodes=20))


@pytest.mark.slow
def test_rainbow_learns_to_balance(tmp_path):
    """CartPole, from about 20 to most of an episode in 20,000 steps."""
    given = {**RAINBOW, "value_loss": "hl-gauss:low=0,high=120", "net_arch": (64, 64)}
    returns = balanced(tmp_path / "run", steps=20_000, seeds=2, **given)
    assert returns[-1] > 150, returns


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dqn_learns_to_balance_as_sb3_does(tmp_path):
    """CartPole, from about 20 to what SB3 reaches with the same options, of three seeds the
    second best: greedy DQN falls now and then."""
    ours = balanced(tmp_path / "run", steps=50_000, seeds=3)
    theirs = stable_baselines3.DQN(
        "MlpPolicy", "CartPole-v1", seed=0, device="cpu", **CARTPOLE,
        policy_kwargs={"net_arch": [256, 256]},
    ).learn(50_000)  # fmt: skip
    reached, _ = evaluate_policy(theirs, gym.make("CartPole-v1"), 20)
    assert ours[1] >= min(450, reached - 50) and ours[1] > 300, (ours, reached)


OPTIONS = (
    "--env CartPole-v1 --steps 3000 --num-envs 2 --batch-size 16 --net-arch 16,16 --train-freq 10 "
    "--buffer-size 2000 --learning-starts 200 --target-update-interval 100 --checkpoint-every 1000 "
    "--metrics-every 1000 --seeds 2 --prioritized-replay --dueling --n-step 2 --device cpu "
    "--value-loss c51:low=0,high=100 --plasticity cbp:rate=0.01,maturity=20"
).split()


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_killed_and_resumed_equals_unbroken(tmp_path):
    """The command, kill -9 of all processes after a checkpoint, and resume: the same bits."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start("train", "dqn", *OPTIONS, "--run-dir", str(whole)))
    process = start("train", "dqn", *OPTIONS, "--run-dir", str(broken))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        steps = checkpoints(broken / "seed-0")
        if steps and steps[-1] >= 1000:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert checkpoints(broken / "seed-0")[-1] < 3000
    finish(start("resume", str(broken)))
    for seed in (0, 1):
        one, other = whole / f"seed-{seed}", broken / f"seed-{seed}"
        assert checkpoints(one)[-1] == checkpoints(other)[-1] == 3000
        assert same(read_checkpoint(one, 3000), read_checkpoint(other, 3000))
        assert (one / "episodes.csv").read_bytes() == (other / "episodes.csv").read_bytes()
        assert scalars(one) == scalars(other)
    out = finish(start("evaluate", str(broken), "--episodes", "2"))
    assert "seed 1: return" in out


def test_a_missing_environment_is_refused_at_once():
    begun = time.monotonic()
    done = subprocess.run(command("train", "dqn"), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: dqn needs --env") and done.stderr.count("\n") == 1
    assert time.monotonic() - begun < 5  # a second on an idle machine
