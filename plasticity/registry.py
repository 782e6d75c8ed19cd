"""All plasticity methods by name: what they are, who wrote them, their parameters.

The tables stand in catalogue_events.py and catalogue_training.py; a new method adds its entry to
one of them. Imports neither torch nor a method: a command is checked without them. A method's file
is imported by `make`. Classes take their defaults from here through `default`; a test compares.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from perennial.plasticity.catalogue_events import EVENTS
from perennial.plasticity.catalogue_training import TRAINING
from perennial.plasticity.metric_names import METRICS as METRICS
from perennial.plasticity.parameters import Entry, Param, Value, nearest

if TYPE_CHECKING:
    from perennial.plasticity.base import Intervention

__all__ = [
    "METHODS",
    "METRICS",
    "Entry",
    "Param",
    "Value",
    "check",
    "default",
    "make",
    "parse_spec",
]

METHODS: dict[str, Entry] = {entry.name: entry for entry in (*EVENTS, *TRAINING)}


def default(method: str, parameter: str) -> Any:
    """A parameter's default, for the signature of the class."""
    return METHODS[method].params[parameter].default


def parse_spec(
    spec: str, known: Mapping[str, Entry] = METHODS, kind: str = "plasticity method"
) -> tuple[str, dict[str, Value]]:
    """`"cbp:rate=1e-4,maturity=10_000"` -> `("cbp", {"rate": 0.0001, "maturity": 10000})`.

    Raises:
        ValueError: one line; the nearest name for a typo, the range for a wrong value.
    """
    name, colon, rest = spec.strip().partition(":")
    name = name.strip()
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{nearest(name, known)}")
    given: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"{name}: cannot read {part!r}; write {name}:parameter=value,...")
        if key in given:
            raise ValueError(f"{name}: {key} is given twice")
        given[key] = value
    return name, check(name, given, known)


def check(
    name: str, given: Mapping[str, Any], known: Mapping[str, Entry] = METHODS
) -> dict[str, Value]:
    """Validated parameters of a known method."""
    params = known[name].params
    for key in given:
        if key not in params:
            raise ValueError(f"{name}: unknown parameter {key!r}{nearest(key, params)}")
    return {key: params[key].check(name, key, value) for key, value in given.items()}


def make(spec: str) -> Intervention:
    """The method that a spec names: `make("cbp:rate=1e-3")`."""
    name, parameters = parse_spec(spec)
    entry = METHODS[name]
    module = importlib.import_module(f"perennial.plasticity.{entry.module}")
    made: Intervention = getattr(module, entry.cls)(**parameters)
    return made
