"""Kinds of option values: one conversion serves the command line, Python calls and config.json.

Each kind turns text or a Python value into the stored value, or raises ValueError with the second
half of a sentence ("expected a whole number from 1, not 'x'"); the caller puts the option's name in
front.
Light on purpose: a wrong command must be refused before torch or a simulator is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

_LARGEST = 10**15  # no run counts further; keeps "1e999999999" from being expanded into digits
_MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Kind:
    """How one option is written and read."""

    metavar: str
    convert: Callable[[Any], Any]  # text or Python value -> stored value; ValueError if impossible
    switch: bool = False  # `--name` / `--no-name`
    many: bool = False  # takes several values and may be repeated
    word: str | None = None  # how None is written, where None is a value
    spelling: Callable[[Any], str] | None = None  # stored value -> text, if not the obvious

    def spell(self, value: Any) -> str:
        """A stored value as the command line takes it."""
        if self.spelling is not None:
            return self.spelling(value)
        if value is None:
            return self.word or "none"
        if isinstance(value, Mapping):
            return " ".join(f"{key}={spell(item)}" for key, item in value.items()) or "none"
        if self.many:
            return " ".join(value) or "none"
        return spell(value)


def option(group: str, kind: Kind, default: Any, help: str, *, hparam: bool = True) -> Any:
    """A dataclass field with its place in `--help`, its kind of value and its help.

    `hparam`: whether TensorBoard's hparams table shows it.
    """
    metadata = {"kind": kind, "help": help, "group": group, "hparam": hparam}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a near miss, else the list of known names (for error messages)."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:  # a name cut short is a near miss too
        close = [other for other in names if name and other.startswith(name)][:1]
    return f"; did you mean {close[0]!r}?" if close else f" (available: {', '.join(names)})"


def spell(value: Any) -> str:
    """A value as options and specs write it: 0.02,2 for a tuple, none, true, 1e-05."""
    if isinstance(value, tuple):
        return ",".join(map(spell, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def shown(value: Any) -> str:
    """A value as error messages quote it: short, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(what: str, value: Any) -> ValueError:
    return ValueError(f"expected {what}, not {shown(value)}")


def _as_whole(value: Any) -> int | None:
    """The whole number meant by 2048, 2e6, "2e6" or "2_000_000"; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        number = Decimal(value.strip() if isinstance(value, str) else repr(float(value)))
    except InvalidOperation:
        return None
    if not number.is_finite() or number.adjusted() > 18 or number != number.to_integral_value():
        return None
    return int(number)


def whole(low: int = 1, high: int = _LARGEST) -> Kind:
    """Whole numbers in [low, high]; 2e6 and 2_000_000 are both fine."""
    bounds = f"from {low}" if high == _LARGEST else f"from {low} to {high}"

    def convert(value: Any) -> int:
        number = _as_whole(value)
        if number is None or not low <= number <= high:
            raise _expected(f"a whole number {bounds}", value)
        return number

    return Kind("N", convert)


def real(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Kind:
    """Finite numbers in [low, high]; `above` and `below` exclude their bound."""
    if above is not None:
        low = above
    if below is not None:
        high = below
    words = []
    if low > -math.inf:
        words.append(f"above {low:g}" if above is not None else f"from {low:g}")
    if high < math.inf:
        words.append(f"below {high:g}" if below is not None else f"up to {high:g}")
    what = " ".join(["a number", *words])

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
            raise _expected(what, value)
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise _expected(what, value) from None
        inside = low <= number <= high and number not in (above, below)
        if not math.isfinite(number) or not inside:
            raise _expected(what, value)
        return number

    return Kind("X", convert)


def optional(kind: Kind, word: str = "none") -> Kind:
    """`kind`, or the word for None (`none` unless told)."""

    def convert(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.strip().lower() == word):
            return None
        try:
            return kind.convert(value)
        except ValueError as error:
            raise ValueError(str(error).replace(", not ", f" or {word!r}, not ", 1)) from None

    return Kind(f"{kind.metavar}|{word}", convert, word=word)


def choice(*names: str) -> Kind:
    """One of a few names."""

    def convert(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            hint = nearest(str(value), names)
            whole_list = "" if "available" in hint else f" (available: {', '.join(names)})"
            raise ValueError(f"unknown value {shown(value)}{hint}{whole_list}")
        return value

    return Kind("|".join(names), convert)


def switch() -> Kind:
    """On or off: `--name`, `--no-name`."""

    def convert(value: Any) -> bool:
        words = {"true": True, "false": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise _expected("true or false", value)
        return value

    return Kind("true|false", convert, switch=True)


def text(metavar: str) -> Kind:
    """Any text that is not empty and fits on a line."""

    def convert(value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise _expected("a name", value)
        return value.strip()

    return Kind(metavar, convert)


def folder() -> Kind:
    """A path, stored as text."""

    def convert(value: Any) -> str:
        path = str(value)
        if not path.strip() or "\0" in path or "\n" in path:
            raise _expected("a folder", value)
        return path

    return Kind("DIR", convert)


def seeds() -> Kind:
    """`4` is 0, 1, 2, 3; `0:4` the same; `0,3,7` those; `3,` only seed 3."""
    what = "seeds as 4 (0 to 3), 0:4, 0,3,7 or 3, (one seed)"

    def span(low: int | None, high: int | None, value: Any) -> range:
        if low is None or high is None or low < 0 or high <= low or high > 2**32:
            raise _expected(what, value)
        if high - low > _MOST_SEEDS:
            raise ValueError(f"expected at most {_MOST_SEEDS} seeds, not {high - low}")
        return range(low, high)

    def convert(value: Any) -> tuple[int, ...]:
        if isinstance(value, str) and ("," in value or ":" in value):
            parts: list[Any] = [part for part in value.split(",") if part.strip()]
        elif isinstance(value, str | numbers.Real):
            return tuple(span(0, _as_whole(value), value))
        else:
            parts = list(value) if isinstance(value, Iterable) else [None]
        numbers_: list[int] = []
        for part in parts:
            if isinstance(part, str) and ":" in part:
                low, _, high = part.partition(":")
                numbers_ += span(_as_whole(low), _as_whole(high), value)
            else:
                seed = _as_whole(part)
                numbers_ += span(seed, None if seed is None else seed + 1, value)
        if not numbers_:
            raise _expected(what, value)
        if len(set(numbers_)) < len(numbers_):
            twice = Counter(numbers_).most_common(1)[0][0]
            raise ValueError(f"seed {twice} is named twice in {shown(value)}; name each seed once")
        return tuple(numbers_)

    def spelling(value: tuple[int, ...]) -> str:
        if value == tuple(range(len(value))):
            return str(len(value))
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")

    return Kind("N|A:B|A,B", convert, spelling=spelling)


def several(kind: Kind, what: str, count: tuple[int, int]) -> Kind:
    """A comma list of `kind` with count[0] to count[1] entries, stored as a tuple."""

    def convert(value: Any) -> tuple[Any, ...]:
        parts = value.strip().strip("()[]").split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            parts = [parts]
        parts = [part for part in parts if part != ""]
        if not count[0] <= len(parts) <= count[1]:
            raise _expected(what, value)
        return tuple(kind.convert(part) for part in parts)

    return Kind(f"{kind.metavar},{kind.metavar}", convert)


def pairs() -> Kind:
    """`key=value` words, or a mapping; stored as a dict, which the environment's specs check."""

    def convert(value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {str(key): item for key, item in value.items()}
        found: dict[str, Any] = {}
        for word in [value] if isinstance(value, str) else value:
            key, equals, item = str(word).partition("=")
            if not equals or not key or not item:
                raise _expected("key=value", word)
            if key in found:
                raise ValueError(f"{key!r} is given twice; give it once")
            found[key] = item
        return found

    return Kind("KEY=VALUE", convert, many=True)


def specs() -> Kind:
    """Method specs (`cbp`, `cbp:rate=1e-4,maturity=10000`), one or a list; stored as a tuple."""

    def convert(value: Any) -> tuple[str, ...]:
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise _expected("specs such as 'cbp' or 'cbp:rate=1e-4'", value)
        return tuple(word.strip() for word in words)

    return Kind("SPEC", convert, many=True)
