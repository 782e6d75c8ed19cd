"""Presets: each builds for all of its agents, holds its protocol's numbers, and starts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perennial.agents.config import UsageError, build_config, from_json, to_json
from perennial.agents.presets import PRESETS
from perennial.agents.record import hparams_of
from perennial.envs.atari_games import DEFAULT_GAMES

KINDS = [(name, agent) for name, preset in PRESETS.items() for agent in preset.agents]
ATARI = ("abbas-atari-cycle", "progress-compress-6", "atari-mini-cycle")


@pytest.mark.parametrize(("name", "agent"), KINDS)
def test_every_preset_builds_and_is_recorded_exactly(name: str, agent: str) -> None:
    config = build_config(agent, preset=name)
    assert (config.agent, config.preset) == (agent, name)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert len(hparams_of(config, 0)) <= 30
    assert PRESETS[name].source and "\n" not in PRESETS[name].help
    crelu = build_config(agent, preset=name, given={"plasticity": ["crelu"]})
    assert crelu.methods[-1] == "crelu"


def test_atari_protocols_come_for_dqn_with_plain_and_distributional_values_and_for_ppo() -> None:
    for name in ATARI:
        plain, ppo = build_config("dqn", preset=name), build_config("ppo", preset=name)
        rainbow: Any = build_config("dqn", preset=f"{name}-c51")
        assert (plain.value_loss, rainbow.value_loss[:3]) == ("mse", "c51")
        assert (rainbow.n_step, rainbow.prioritized_replay) == (3, True)
        assert plain.env_args == ppo.env_args == rainbow.env_args
        assert plain.steps == ppo.steps == rainbow.steps
        assert plain.clips_rewards == ppo.clips_rewards == 1.0
        rounds = plain.steps / plain.env_args["change_every"] / len(plain.env_args["games"])
        assert rounds == (3 if "mini" in name else 5)
        c51 = build_config("dqn", preset=name, given={"value_loss": "c51"})
        assert c51.value_loss == "c51"
    with pytest.raises(UsageError, match="'abbas-atari-cycle-c51' is for dqn, not for ppo"):
        build_config("ppo", preset="abbas-atari-cycle-c51")
    with pytest.raises(UsageError, match="is for dqn and ppo, not for sac"):
        build_config("sac", preset="abbas-atari-cycle")


def test_published_numbers_of_the_atari_protocols() -> None:
    abbas: Any = build_config("dqn", preset="abbas-atari-cycle")
    assert abbas.env_args["change_every"] * 4 == 20_000_000  # frames
    assert (abbas.learning_rate, abbas.adam_eps, abbas.batch_size) == (6.25e-5, 1.5e-4, 32)
    assert (abbas.learning_starts, abbas.train_freq, abbas.buffer_size) == (20_000, 4, 1_000_000)
    assert (abbas.target_update_interval, abbas.exploration_final_eps) == (8_000, 0.01)
    assert round(abbas.exploration_fraction * abbas.steps) == 250_000
    compress: Any = build_config("dqn", preset="progress-compress-6")
    assert compress.env_args["games"] == DEFAULT_GAMES
    assert compress.env_args["change_every"] * 4 == 50_000_000
    assert round(compress.exploration_fraction * compress.steps) == 250_000
    ppo: Any = build_config("ppo", preset="progress-compress-6")
    assert (ppo.num_envs, ppo.n_steps, ppo.rollout // ppo.batch_size) == (8, 128, 4)
    assert (ppo.learning_rate, ppo.lr_schedule, ppo.clip_range) == (2.5e-4, "linear", 0.1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("atari-mini-cycle", "dqn --steps 1000 --learning-starts 980"),
        ("atari-mini-cycle-c51", "dqn --steps 1000 --learning-starts 980"),
        ("atari-mini-cycle", "ppo --steps 128 --n-steps 16 --batch-size 64 --n-epochs 1"),
    ],
)
def test_a_shortened_run_of_each_kind_goes_through(tmp_path: Path, name: str, options: str) -> None:
    agent, *rest = options.split()
    run = tmp_path / "run"
    words = [agent, "--preset", name, *rest, "--run-dir", str(run), "--device", "cpu"]
    command = [sys.executable, "-m", "perennial.agents", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "config.json").read_text())["preset"] == name
    assert list(run.glob("seed-0/checkpoints/*/manifest.json"))
