"""What a registry entry is made of: a parameter with its range, a method with its parameters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Value = bool | int | float | str


@dataclass(frozen=True)
class Param:
    """One parameter: its type is its default's. `low`, `high` are inclusive unless `open_low`."""

    default: Value
    help: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return " | ".join(self.choices)
        if isinstance(self.default, bool):
            return "true | false"
        if isinstance(self.default, str):
            return "a name"
        low = "" if self.low is None else f"{'>' if self.open_low else '>='} {self.low:g}"
        high = "" if self.high is None else f"<= {self.high:g}"
        return " and ".join(part for part in (low, high) if part) or "any number"

    def check(self, method: str, name: str, value: Any) -> Value:
        """The value as the parameter's type; one line for anything else."""
        wrong = ValueError(f"{method}: {name}={value} is not {self._kind()} ({self.range})")
        if self.choices:
            if value not in self.choices:
                raise ValueError(
                    f"{method}: {name}={value} is unknown{nearest(str(value), self.choices)}"
                )
            return str(value)
        if isinstance(self.default, bool):
            words = {"true": True, "false": False}
            if isinstance(value, bool):
                return value
            if str(value).lower() not in words:
                raise wrong
            return words[str(value).lower()]
        if isinstance(self.default, str):
            return str(value)
        try:
            number = float(value.replace("_", "") if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise wrong from None
        if isinstance(value, bool) or not math.isfinite(number):
            raise wrong
        if self.low is not None and (number <= self.low if self.open_low else number < self.low):
            raise ValueError(f"{method}: {name}={value} must be {self.range}")
        if self.high is not None and number > self.high:
            raise ValueError(f"{method}: {name}={value} must be {self.range}")
        if isinstance(self.default, int):
            if number != int(number):
                raise wrong
            return int(number)
        return number

    def _kind(self) -> str:
        if isinstance(self.default, bool):
            return "a truth value"
        return "a whole number" if isinstance(self.default, int) else "a number"


@dataclass(frozen=True)
class Entry:
    """One method: where its class is, one line about it, its source, its parameters."""

    name: str
    module: str
    cls: str
    line: str
    paper: str
    params: Mapping[str, Param]


def nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"
