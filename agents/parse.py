"""Command lines through tyro, with our one-line errors instead of its boxes.

tyro splits words into options and writes the grouped help; every value is converted by its option's
kind, so that the command line, Python calls and config.json agree on what is possible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from perennial.agents.config import UsageError
from perennial.agents.options import Kind, nearest, shown

_POSITIONAL: Any = tyro.conf.Positional  # subscripted with types made at run time
_REPEATED: Any = tyro.conf.UseAppendAction


@dataclass(frozen=True)
class Argument:
    """One option or positional word of a command."""

    name: str  # as a Python name: `n_steps` is `--n-steps`
    kind: Kind
    help: str
    default: Any = None
    group: str = "command"
    positional: bool = False


def parse(
    command: str, about: str, arguments: Sequence[Argument], words: Sequence[str]
) -> dict[str, Any]:
    """What the words give, by argument: text, a list of it where many go, a bool for a switch.

    Arguments that are not given are absent. Prints the help and raises SystemExit(0) for `--help`.
    Groups of the help come in the order of their first arguments.

    Raises:
        UsageError: unknown options (with the nearest known one), missing values.
    """
    groups: dict[str, list[Argument]] = {}
    for argument in arguments:
        groups.setdefault(argument.group, []).append(argument)
    structs = {name: _struct(name, members) for name, members in groups.items()}
    form: type[Any] = dataclasses.make_dataclass(
        "Form",
        [
            (name, struct, dataclasses.field(default_factory=struct))
            for name, struct in structs.items()
        ],
    )
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            found, unknown = tyro.cli(
                form,
                prog=command,
                description=about,
                args=list(words),
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(complaints.getvalue())) from None
    if unknown:
        raise UsageError(_unknown(command, unknown[0], arguments))
    given = {}
    for argument in arguments:
        value = getattr(getattr(found, argument.group), argument.name)
        if argument.kind.many and not argument.positional:
            if any(not words_ for words_ in value):
                raise UsageError(f"{_flag(argument)} needs a value: {argument.kind.metavar} ...")
            value = list(itertools.chain.from_iterable(value)) or None
        if value is not None and not (argument.kind.switch and value == argument.default):
            given[argument.name] = value
    return given


def parse_values(
    command: str, about: str, arguments: Sequence[Argument], words: Sequence[str]
) -> dict[str, Any]:
    """Every argument's converted value, or its default; otherwise as `parse`."""
    given = parse(command, about, arguments, words)
    values = {}
    for argument in arguments:
        values[argument.name] = argument.default
        if argument.name in given:
            try:
                values[argument.name] = argument.kind.convert(given[argument.name])
            except ValueError as error:
                raise UsageError(f"{argument.name}: {error}") from None
    return values


def _struct(name: str, members: Sequence[Argument]) -> type:
    """A dataclass that tyro shows as one group of the help."""
    struct = dataclasses.make_dataclass(
        name, [(m.name, _annotation(m), dataclasses.field(default=_unset(m))) for m in members]
    )
    struct.__doc__ = None  # else tyro prints the generated signature
    return struct


def _unset(argument: Argument) -> Any:
    if argument.kind.switch:
        return argument.default
    return () if argument.kind.many and not argument.positional else None


def _annotation(argument: Argument) -> Any:
    kind = argument.kind
    bare = (
        argument.positional
        or argument.default == ""  # must be given
        or (argument.default is None and kind.word is None)
    )
    hint = "" if bare else f"(default: {kind.spell(argument.default)})"
    if kind.switch:
        about = tyro.conf.arg(help=argument.help, help_behavior_hint=hint)
        if argument.default is False and argument.group == "run":
            return tyro.conf.FlagCreatePairsOff[Annotated[bool, about]]
        return Annotated[bool, about]
    words: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
        nargs="*" if kind.many else 1,
        metavar=kind.metavar,
        instance_from_str=(lambda found: found) if kind.many else (lambda found: found[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [],
    )
    metavar = f"{kind.metavar} ..." if kind.many else kind.metavar
    if argument.positional:
        metavar = argument.name.upper() + (" ..." if kind.many else "")
    about = tyro.conf.arg(help=argument.help, help_behavior_hint=hint, metavar=metavar)
    one: Any = Annotated[Any, words]
    if argument.positional:
        return _POSITIONAL[Annotated[one, about]]
    if kind.many:
        return _REPEATED[Annotated[tuple[one, ...], about]]
    return Annotated[one, about]


def _flag(argument: Argument) -> str:
    return "--" + argument.name.replace("_", "-")


def _unknown(command: str, word: str, arguments: Sequence[Argument]) -> str:
    flags = ["--help", *(_flag(argument) for argument in arguments if not argument.positional)]
    if not word.startswith("-"):
        return f"unexpected word {shown(word)}; see `{command} --help`"
    name = word.split("=")[0]
    hint = nearest(name, flags)
    if hint.startswith(" ("):  # the whole list would not fit on a line
        hint = f"; see `{command} --help`"
    return f"unknown option {shown(name)}{hint}"


def _one_line(box: str) -> str:
    """tyro's box without its frame, title and advice."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in box.splitlines()]
    kept = [line for line in lines if line and not re.match(r"[╭╰─]", line)]
    text = " ".join(line for line in kept if not line.startswith("For full helptext"))
    return re.sub(r"\s+", " ", text) or "this command line cannot be read; see --help"
