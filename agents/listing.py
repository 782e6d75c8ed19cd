"""What `perennial list` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perennial.agents.config import AGENTS
from perennial.agents.options import spell


def lines(topic: str) -> Iterator[str]:
    """The lines about `topic`: agents, envs, plasticity, metrics or presets."""
    return {
        "agents": _agents,
        "envs": _envs,
        "plasticity": _plasticity,
        "metrics": _metrics,
        "presets": _presets,
    }[topic]()


def _agents() -> Iterator[str]:
    for name, config in AGENTS.items():
        yield f"{name}  {(config.__doc__ or '').splitlines()[0]}"


def _envs() -> Iterator[str]:
    from perennial.envs.specs import ENVS

    for entry in ENVS.values():
        extra = f" (pip install 'perennial-rl[{entry.extra}]')" if entry.extra else ""
        yield f"{entry.env_id}  {entry.line}{extra}"
        for param in entry.params:
            yield from _parameter(param.name, param.default, param.help)
    yield "every registered Gymnasium id works as well, such as Pendulum-v1"


def _plasticity() -> Iterator[str]:
    from perennial.plasticity.registry import METHODS
    from perennial.plasticity.value_registry import VALUES

    for entry in METHODS.values():
        yield f"{entry.name}  {entry.line}"
        yield f"    {entry.paper}"
        for name, param in entry.params.items():
            yield from _parameter(name, param.default, f"{param.help} ({param.range})")
    yield "value losses, for --value-loss:"
    for entry in VALUES.values():
        yield f"{entry.name}  {entry.line}"
        if entry.paper:
            yield f"    {entry.paper}"
        for name, param in entry.params.items():
            yield from _parameter(name, param.default, f"{param.help} ({param.range})")


def _metrics() -> Iterator[str]:
    from perennial.plasticity.registry import METRICS

    for name, line in METRICS.items():
        yield f"{name:<22} {line}"


def _presets() -> Iterator[str]:
    from perennial.agents.presets import PRESETS

    for name, preset in PRESETS.items():
        yield f"{name}  {', '.join(preset.agents)}: {preset.help}"
        yield f"    {preset.source}"


def _parameter(name: str, default: Any, help: str) -> Iterator[str]:
    yield f"    {name + '=' + spell(default):<24} {help}"
