"""One parameter of an environment: its range, and how a string or a value is read and checked."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Param:
    """One parameter of an environment.

    kind: "int", "float", "ints" or "numbers" (tuples of ints, of floats), "choice", "choices" (a
    tuple of them; case and underscores do not matter) or "flag". `low` and `high` bound every
    number, `size` the length of "numbers". `optional` parameters take None ("none").
    """

    name: str
    kind: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    size: int | None = None
    optional: bool = False

    def parse(self, value: Any) -> Any:
        """The checked value of a string or a Python value; ValueError in one line."""
        if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
            if self.optional:
                return None
            raise ValueError(f"{self.name} must be {self._wanted()}; got none")
        if self.kind == "choice":
            return self._choice(value)
        if self.kind == "flag":
            return self._flag(value)
        if self.kind == "choices":
            return tuple(self._named(str(part)) for part in self._parts(value))
        if self.kind == "ints":
            return tuple(int(self._number(part, whole=True)) for part in self._parts(value))
        if self.kind == "numbers":
            return self._numbers(value)
        return self._number(value, whole=self.kind == "int")

    def _choice(self, value: Any) -> str:
        if value in self.choices:
            return str(value)
        raise ValueError(f"{self.name}={value}: {nearest(str(value), self.choices)}")

    def _named(self, name: str) -> str:
        folded = {_folded(choice): choice for choice in self.choices}
        if _folded(name) in folded:
            return folded[_folded(name)]
        raise ValueError(f"{self.name}={name.strip()}: {nearest(name, self.choices)}")

    def _flag(self, value: Any) -> bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        flag = value if isinstance(value, bool) else words.get(str(value).strip().lower())
        if flag is None:
            raise ValueError(f"{self.name} must be true or false; got {value}")
        return flag

    def _parts(self, value: Any) -> list[Any]:
        parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
        parts = list(parts) if isinstance(parts, Iterable) else [parts]
        if not parts or parts == [""]:
            raise ValueError(f"{self.name} must be {self._wanted()}; got none")
        return parts

    def _numbers(self, value: Any) -> tuple[float, ...]:
        numbers = tuple(float(self._number(part, whole=False)) for part in self._parts(value))
        if self.size is not None and len(numbers) != self.size:
            raise ValueError(f"{self.name} must be {self._wanted()}; got {len(numbers)}: {value}")
        return numbers

    def _number(self, value: Any, whole: bool) -> int | float:
        try:
            if isinstance(value, bool):
                raise ValueError
            number = _to_number(value)
            if not math.isfinite(number) or (whole and number != int(number)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{self.name} must be {self._wanted()}; got {value}") from None
        too_low = self.low is not None and number < self.low
        if too_low or (self.high is not None and number > self.high):
            raise ValueError(f"{self.name} must be {self._wanted()}; got {value}")
        return int(number) if whole else float(number)

    def _wanted(self) -> str:
        many = "numbers" if self.size is None else f"{self.size} numbers"
        noun = {
            "int": "a whole number",
            "float": "a number",
            "ints": "whole numbers",
            "numbers": many,
            "choice": f"one of {', '.join(self.choices)}",
            "choices": f"names such as {', '.join(self.choices[:3])}",
            "flag": "true or false",
        }[self.kind]
        if self.low is not None and self.high is not None:
            return f"{noun} from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"{noun} of at least {self.low:g}"
        return noun


def _to_number(value: Any) -> int | float:
    """A number as the user means it: 200000, 2e5 or 2_000_000."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return float(value)
    return value if isinstance(value, int) else float(value)


def _folded(name: str) -> str:
    return name.strip().lower().replace("_", "")


def nearest(name: str, known: Iterable[str], listed: bool = True) -> str:
    """How a misspelt name's error goes on: the nearest known name, or the whole list."""
    known = list(known)
    folded = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    if close:
        return f"did you mean {folded[close[0]]}?"
    return f"choose from {', '.join(known)}" if listed else "see `perennial list envs`"
