"""Configurations: what is refused and how, presets against the published table, exact records."""

import json
import subprocess
import sys
from typing import Any

import pytest

from perennial.agents.config import (
    AGENTS,
    PPOConfig,
    UsageError,
    build_config,
    fields_of,
    from_json,
    to_json,
)
from perennial.agents.presets import PRESETS


def recorded(config: Any) -> Any:
    """What a later process reads from config.json."""
    return from_json(json.loads(json.dumps(to_json(config), allow_nan=False)))


def ppo(**given: Any) -> PPOConfig:
    config = build_config("ppo", given=given)
    assert isinstance(config, PPOConfig)
    return config


def test_defaults_are_those_of_stable_baselines3() -> None:
    import inspect

    from stable_baselines3 import PPO

    theirs = {name: p.default for name, p in inspect.signature(PPO.__init__).parameters.items()}
    shared = {
        "learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range",
        "clip_range_vf", "ent_coef", "vf_coef", "max_grad_norm", "target_kl",
    }  # fmt: skip
    ours = vars(ppo())
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"steps": "2e6"}, "steps", 2_000_000),
        ({"steps": "2_000_000"}, "steps", 2_000_000),
        ({"steps": 2e6}, "steps", 2_000_000),
        ({"n_steps": "1e3", "batch_size": "1e2"}, "n_steps", 1000),
        ({"seeds": "4"}, "seeds", (0, 1, 2, 3)),
        ({"seeds": 4}, "seeds", (0, 1, 2, 3)),
        ({"seeds": "2:5"}, "seeds", (2, 3, 4)),
        ({"seeds": "0,3,7"}, "seeds", (0, 3, 7)),
        ({"seeds": "3,"}, "seeds", (3,)),
        ({"seeds": [5]}, "seeds", (5,)),
        ({"seeds": "0:2,9"}, "seeds", (0, 1, 9)),
        ({"betas": "0.5,0.75"}, "betas", (0.5, 0.75)),
        ({"net_arch": "64"}, "net_arch", (64,)),
        ({"net_arch": [64, 32]}, "net_arch", (64, 32)),
        ({"max_grad_norm": "none"}, "max_grad_norm", None),
        ({"target_kl": "0.02"}, "target_kl", 0.02),
        ({"norm_obs": True}, "norm_obs", True),
        ({"clip_actions": "true"}, "clip_actions", True),
        ({"env_args": {"change_every": "2e5"}}, "env_args", {"change_every": 200_000}),
        ({"env_args": ["friction=0.1,1"]}, "env_args", {"friction": (0.1, 1.0)}),
        ({"plasticity": "cbp"}, "plasticity", ("cbp",)),
        ({"plasticity": ["cbp:rate=1e-3", "l2"]}, "plasticity", ("cbp:rate=1e-3", "l2")),
    ],
)
def test_values_are_understood_and_recorded(given: dict[str, Any], name: str, value: Any) -> None:
    config = ppo(**given)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    assert recorded(config) == config


IMPOSSIBLE = [
    *[({"steps": bad}, "steps: expected a whole number") for bad in
      ("nan", "inf", "-1", "0", "1.5", "1e400", "1e999999999", "x", "", float("nan"), True, None)],
    *[({name: bad}, f"{name}: expected a number")
      for name in ("learning_rate", "gamma", "gae_lambda", "clip_range", "ent_coef", "vf_coef",
                   "max_grad_norm", "target_kl", "adam_eps", "log_std_init", "clip_range_vf")
      for bad in ("nan", "inf", "-inf", "x", True)],
    *[({name: "0"}, f"{name}: expected a number above 0")
      for name in ("learning_rate", "clip_range", "max_grad_norm", "target_kl", "adam_eps")],
    *[({name: bad}, f"{name}: expected a whole number")
      for name in ("num_envs", "n_steps", "batch_size", "n_epochs", "checkpoint_every",
                   "metrics_every") for bad in ("0", "-3", "2.5")],
    ({"gamma": "1.5"}, "from 0 up to 1, not '1.5'"),
    ({"gamma": "-0.1"}, "from 0 up to 1, not '-0.1'"),
    ({"betas": "0.9"}, "two numbers such as 0.9,0.999"),
    ({"betas": "0.9,1"}, "below 1"),
    ({"betas": "0.9,nan"}, "not 'nan'"),
    ({"net_arch": "0"}, "net_arch: expected a whole number from 1"),
    ({"net_arch": ""}, "widths such as 256,256"),
    ({"activation": "rleu"}, "did you mean 'relu'?"),
    ({"init": "lecum"}, "did you mean 'lecun'?"),
    ({"advantage_norm": "mini"}, "did you mean 'minibatch'?"),
    ({"timeout": "ignore"}, "available: bootstrap, terminal"),
    ({"value_loss": "c15"}, "did you mean 'c51'"),
    ({"device": "gpu"}, "available: auto, cpu, cuda"),
    ({"seeds": "1,1"}, "seed 1 is named twice"),
    ({"seeds": "0:3,2"}, "seed 2 is named twice"),
    ({"seeds": "0"}, "seeds: expected seeds as 4"),
    ({"seeds": "-1,"}, "seeds: expected seeds as 4"),
    ({"seeds": "3:3"}, "seeds: expected seeds as 4"),
    ({"seeds": "nan"}, "seeds: expected seeds as 4"),
    ({"seeds": ","}, "seeds: expected seeds as 4"),
    ({"seeds": "1e9"}, "at most 10000 seeds"),
    ({"batch_size": 100}, "batch_size=100 does not divide n_steps*num_envs=2048; try 64 or 128"),
    ({"batch_size": 4096}, "batch_size=4096 does not divide n_steps*num_envs=2048; try 2048"),
    ({"batch_size": 1}, "take batch_size of 2 or more"),
    ({"n_steps": 1, "batch_size": 1, "advantage_norm": "batch"}, "take n_steps of 2 or more"),
    ({"steps": 100}, "steps=100 is less than one rollout of 2048"),
    ({"step": 1}, "unknown option 'step' for ppo; did you mean 'steps'?"),
    ({"env": "perennial/SlipperyAmt-v0"}, "did you mean perennial/SlipperyAnt-v0?"),
    ({"env": "Pendulun-v1"}, "Pendulum-v1"),
    ({"env": "two\nlines"}, "env: expected a name"),
    ({"env_args": ["frction=1,2"]}, "did you mean friction?"),
    ({"env_args": ["friction"]}, "env_args: expected key=value, not 'friction'"),
    ({"env_args": ["friction=nan,1"]}, "friction"),
    ({"env_args": ["change_every=0"]}, "change_every"),
    ({"env_args": ["change_every=1", "change_every=2"]}, "'change_every' is given twice"),
    ({"env": "CartPole-v1", "env_args": {"sutton_barto_reward": b"1"}}, "cannot be recorded"),
    ({"plasticity": "cpb"}, "cbp"),
    ({"plasticity": "cbp:rat=1"}, "rate"),
    ({"plasticity": "cbp:rate=nan"}, "rate"),
    ({"plasticity": "cbp:rate=-1"}, "rate"),
    ({"plasticity": ["cbp", "cbp:rate=1e-3"]}, "'cbp' is named twice"),
    ({"plasticity": 3}, "plasticity: expected specs"),
    ({"plasticity": "adam-equal-betas", "betas": "0.9,0.999"}, "betas=0.9,0.999 clashes with adam"),
    ({"preset": "nature-slippery-ant-cpb"}, "did you mean 'nature-slippery-ant-cbp'?"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), IMPOSSIBLE, ids=lambda v: str(v)[:60])
def test_impossible_values_are_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_config("ppo", given=given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_agent_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown agent 'pp'; did you mean 'ppo'\?"):
        build_config("pp")


def test_presets_are_the_published_table() -> None:
    arms = {
        "std": ((0.9, 0.999), ()),
        "ns": ((0.99, 0.99), ()),
        "l2": ((0.99, 0.99), ("l2:strength=1e-3",)),
        "cbp": ((0.99, 0.99), ("l2:strength=1e-4", "cbp:rate=1e-4,maturity=10000,decay=0.99,"
                               "utility=contribution,reference=nature")),
    }  # fmt: skip
    nature = {name for name in PRESETS if name.startswith("nature-")}
    assert nature == {f"nature-slippery-ant-{arm}" for arm in arms}
    for arm, (betas, plasticity) in arms.items():
        config = ppo(preset=f"nature-slippery-ant-{arm}")
        assert (config.betas, config.plasticity) == (betas, plasticity)
        assert (config.learning_rate, config.n_steps, config.batch_size) == (1e-4, 2048, 128)
        assert (config.n_epochs, config.gamma, config.gae_lambda) == (10, 0.99, 0.95)
        assert (config.clip_range, config.clip_range_vf, config.ent_coef) == (0.2, None, 0.0)
        assert (config.vf_coef, config.max_grad_norm, config.adam_eps) == (1.0, None, 1e-8)
        assert (config.net_arch, config.activation, config.init) == ((256, 256), "relu", "lecun")
        assert (config.advantage_norm, config.timeout) == ("batch", "terminal")
        assert (config.norm_obs, config.norm_reward, config.clips_actions) == (False, False, False)
        assert config.steps == 20_000_000
        assert config.env_args == {
            "change_every": 2_000_000, "friction": (0.02, 2.0), "observation": "v3",
            "reference": "nature",
        }  # fmt: skip
        assert recorded(config) == config


def test_explicit_options_override_the_preset() -> None:
    config = ppo(
        preset="nature-slippery-ant-cbp",
        learning_rate=3e-4,
        env_args=["change_every=200000"],
        plasticity=["cbp:rate=1e-3", "adam-equal-betas"],
    )
    assert config.preset == "nature-slippery-ant-cbp"
    assert (config.learning_rate, config.batch_size) == (3e-4, 128)
    assert config.env_args["change_every"] == 200_000
    assert config.env_args["observation"] == "v3"
    assert config.plasticity == ("l2:strength=1e-4", "cbp:rate=1e-3", "adam-equal-betas")
    elsewhere = ppo(preset="nature-slippery-ant-std", env="Pendulum-v1")
    assert (elsewhere.env_args, elsewhere.batch_size) == ({}, 128)


def test_equal_betas_are_resolved() -> None:
    config = ppo(plasticity=["cbp", "adam-equal-betas"])
    assert config.betas == (0.99, 0.99)
    assert config.methods == ("cbp", "adam-equal-betas")
    assert config.interventions == ("cbp",)
    assert ppo(plasticity="adam-equal-betas", betas="0.99,0.99").betas == (0.99, 0.99)
    over_preset = ppo(preset="nature-slippery-ant-std", plasticity="adam-equal-betas")
    assert over_preset.betas == (0.99, 0.99)
    assert recorded(over_preset) == over_preset


def test_records_are_strict() -> None:
    record = to_json(ppo(env="CartPole-v1", env_args={"sutton_barto_reward": True}))
    assert from_json(record | {"versions": {}, "grouping": {}}) == from_json(record)
    del record["gamma"]
    assert from_json(record) == ppo(env="CartPole-v1", env_args={"sutton_barto_reward": True})
    for broken, message in [
        ({"gama": 1}, "did you mean 'gamma'"),
        ({"gamma": float("nan")}, "gamma: expected"),
        ({"agent": "rainbow"}, "unknown agent 'rainbow'"),
        ({"agent": None}, "names no agent"),
    ]:
        with pytest.raises(UsageError, match=message):
            from_json(record | broken)


def test_foreign_arguments_come_back_as_they_were() -> None:
    config = ppo(env="Ant-v5", env_args=["healthy_z_range=(0.3, 0.9)", "main_body=[1]"])
    assert config.env_args == {"healthy_z_range": (0.3, 0.9), "main_body": (1,)}
    assert recorded(config) == config


def test_intervals_are_whole_rollouts() -> None:
    config = ppo(steps=1_000_000)
    assert config.checkpoint_interval == 24 * 2048
    assert config.metrics_interval == 4 * 2048
    assert ppo(steps=100_000_000).checkpoint_interval <= 251_000
    assert ppo(steps=100_000_000).metrics_interval >= 50_000
    assert ppo(steps=4096, checkpoint_every=1).checkpoint_interval == 2048
    assert ppo(metrics_every=5000).metrics_interval == 3 * 2048


def test_our_environments_see_unclipped_actions() -> None:
    assert not ppo().clips_actions
    assert ppo(env="Pendulum-v1").clips_actions
    assert not ppo(env="Pendulum-v1", clip_actions=False).clips_actions
    assert ppo(clip_actions=True).clips_actions


@pytest.mark.parametrize("agent", AGENTS)
def test_every_default_is_a_possible_value_with_help(agent: str) -> None:
    config = build_config(agent, given={"env": "CartPole-v1"} if agent == "dqn" else None)
    for name, field in fields_of(agent).items():
        kind, value = field.metadata["kind"], getattr(config, name)
        assert kind.convert(value) == value
        assert field.metadata["help"]
        assert field.metadata["help"].isascii()
        if not kind.many:  # and as `--help` spells it
            assert kind.convert(kind.spell(value)) == value


def test_checking_imports_neither_torch_nor_a_simulator() -> None:
    code = (
        "import sys; from perennial.agents.config import build_config;"
        "build_config('ppo', 'nature-slippery-ant-cbp', {'seeds': 4});"
        "print(sorted({'torch', 'mujoco', 'tensorboard', 'tyro'} & {*sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
