"""Building and recording a run's configuration: command line, Python call and config.json at once.

    config = build_config("ppo", preset=None, given={"steps": "2e6", "plasticity": ["cbp"]})
    assert from_json(to_json(config)) == config

A preset comes first, explicit options override it. Impossible values raise UsageError with one line
that names the clash and the fix. Nothing here imports torch or a simulator: a command is checked in
well under a second.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from perennial.agents.dqn_config import DQNConfig
from perennial.agents.options import Kind, nearest, shown
from perennial.agents.ppo_config import PPOConfig
from perennial.agents.sac_config import SACConfig
from perennial.agents.settings import EQUAL_BETAS, Config, UsageError

__all__ = [
    "AGENTS",
    "Config",
    "DQNConfig",
    "PPOConfig",
    "SACConfig",
    "UsageError",
    "build_config",
    "config_class",
    "fields_of",
    "from_json",
    "to_json",
]

_NOT_OPTIONS = ("agent", "versions", "grouping", "threads")  # what else config.json holds

AGENTS: dict[str, type[Config]] = {c.agent: c for c in (PPOConfig, SACConfig, DQNConfig)}


def fields_of(agent: str) -> dict[str, dataclasses.Field[Any]]:
    """The options of an agent by name, in the order of the dataclass."""
    return {field.name: field for field in dataclasses.fields(config_class(agent))}


def config_class(agent: str) -> type[Config]:
    """The dataclass of an agent's options."""
    if agent not in AGENTS:
        raise UsageError(f"unknown agent {shown(agent)}{nearest(agent, AGENTS)}")
    return AGENTS[agent]


def build_config(
    agent: str, preset: str | None = None, given: Mapping[str, Any] | None = None
) -> Config:
    """The checked configuration of a run.

    Args:
        agent: a key of AGENTS.
        preset: name of a published protocol, whose options come first (or in `given["preset"]`).
        given: option name -> text or value. `env_args` are merged with the preset's key by key (and
            the preset's dropped when `given` names another environment); `plasticity` is added to
            the preset's, replacing a method of the same name.

    Raises:
        UsageError: unknown names (with the nearest known one), impossible numbers, clashes.
    """
    cls = config_class(agent)
    known = fields_of(agent)
    given = dict(given or {})
    for name in given:
        if name not in known:
            raise UsageError(f"unknown option {shown(name)} for {agent}{nearest(name, known)}")
    named = given.pop("preset", None)
    preset = named if preset is None else preset
    base = cls() if preset is None else _preset(agent, preset)
    values = {name: _convert(known[name], item) for name, item in given.items()}
    if "env_args" in values and values.get("env", base.env) == base.env:
        values["env_args"] = base.env_args | values["env_args"]
    elif "env" in values and values["env"] != base.env:
        values.setdefault("env_args", {})
    if "plasticity" in values:
        values["plasticity"] = _merge_specs(base.plasticity, values["plasticity"])
    config = _resolve(dataclasses.replace(base, **values, preset=preset), "betas" in values)
    config.validate()
    return config


def to_json(config: Config) -> dict[str, Any]:
    """A flat record of plain JSON values: "agent" and every option."""
    return {"agent": config.agent, **{name: _plain(value) for name, value in vars(config).items()}}


def from_json(record: Mapping[str, Any]) -> Config:
    """The configuration that `to_json` recorded; options it lacks take their defaults.

    Raises:
        UsageError: not such a record, or an option that is unknown or impossible.
    """
    agent = record.get("agent")
    if not isinstance(agent, str):
        raise UsageError("the record names no agent, so it is no configuration of a run")
    known = fields_of(agent)
    values = {}
    for name, item in record.items():
        if name in _NOT_OPTIONS:
            continue
        if name not in known:
            raise UsageError(f"unknown option {shown(name)} for {agent}{nearest(name, known)}")
        values[name] = _convert(known[name], item)
    config = _resolve(config_class(agent)(**values), "betas" in values)
    config.validate()
    return config


def _preset(agent: str, name: str) -> Config:
    from perennial.agents.presets import PRESETS  # presets are built of the classes above

    if name not in PRESETS:
        fitting = [key for key, preset in PRESETS.items() if agent in preset.agents]
        raise UsageError(f"unknown preset {shown(name)}{nearest(str(name), fitting)}")
    preset = PRESETS[name]
    if agent not in preset.agents:
        raise UsageError(f"preset {name!r} is for {' and '.join(preset.agents)}, not for {agent}")
    return preset.config(agent)


def _convert(field: dataclasses.Field[Any], value: Any) -> Any:
    kind: Kind = field.metadata["kind"]
    try:
        return kind.convert(value)
    except ValueError as error:
        raise UsageError(f"{field.name}: {error}") from None


def _merge_specs(first: tuple[str, ...], added: tuple[str, ...]) -> tuple[str, ...]:
    """The preset's methods, those of the same name replaced, then the others that were given."""
    given = {spec.partition(":")[0]: spec for spec in added}
    if len(given) < len(added):
        names = [spec.partition(":")[0] for spec in added]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"plasticity: {twice!r} is named twice; name each method once")
    merged = [given.pop(spec.partition(":")[0], spec) for spec in first]
    return (*merged, *given.values())


def _resolve(config: Config, betas_given: bool) -> Config:
    """Check the environment's arguments and the methods' parameters; resolve what is sugar."""
    from perennial.envs.specs import check_actions, check_args, check_env

    if not config.env:
        raise UsageError(
            f"{config.agent} needs --env, an environment such as CartPole-v1 or "
            "perennial/AtariSwitch-v0"
        )
    changes: dict[str, Any] = {}
    try:
        check_env(config.env)
        check_actions(config.env, config.agent, config.discrete_actions)
        changes["env_args"] = _recordable(check_args(config.env, config.env_args))
        methods = _parse_methods(config.plasticity)
        _check_value_loss(config.value_loss)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from None
    if EQUAL_BETAS in methods:
        betas = (methods[EQUAL_BETAS].get("beta", 0.99),) * 2
        before = getattr(config, "betas", betas)
        if betas_given and before != betas:
            raise UsageError(
                f"betas={before[0]:g},{before[1]:g} clashes with {EQUAL_BETAS}, which sets them to "
                f"{betas[0]:g},{betas[1]:g}; give one of the two"
            )
        changes["betas"] = betas
    return dataclasses.replace(config, **changes)


def _parse_methods(plasticity: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    if not plasticity:
        return {}
    from perennial.plasticity.registry import parse_spec

    methods: dict[str, dict[str, Any]] = {}
    for spec in plasticity:
        name, parameters = parse_spec(spec)
        if name in methods:
            raise UsageError(f"plasticity: {name!r} is named twice; name each method once")
        methods[name] = dict(parameters)
    return methods


def _check_value_loss(spec: str) -> None:
    if spec != "mse":
        from perennial.plasticity.value_registry import parse_spec

        parse_spec(spec)


def _recordable(env_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments with lists as tuples, so that config.json gives back exactly the same."""
    frozen = {name: _frozen(value) for name, value in env_args.items()}
    for name, value in frozen.items():
        try:
            text = json.dumps(_plain(value), allow_nan=False)
        except (TypeError, ValueError):
            text = "null"
        if _frozen(json.loads(text)) != value:
            raise UsageError(
                f"env_args: {name}={shown(value)} cannot be recorded in config.json; "
                "give finite numbers, text, true, false, none, or lists of them"
            )
    return frozen


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return value
