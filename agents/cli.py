"""The command `perennial`, also `python -m perennial.agents`.

    perennial train ppo --env-args change_every=200000 --steps 1e6 --seeds 2 --plasticity cbp

A mistake of the user's is one line `error: ...` on stderr and exit status 2. Everything that can be
checked without torch or a simulator is checked before either is imported.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence

from perennial.agents.config import AGENTS, UsageError, build_config, config_class, to_json
from perennial.agents.options import choice, folder, nearest, shown, specs, switch, text, whole
from perennial.agents.parse import Argument, parse, parse_values

TOPICS = ("agents", "envs", "plasticity", "metrics", "presets")

GROUPS = ("experiment", "algorithm", "network", "plasticity", "run")
_DIR = Argument("dir", folder(), "the run's folder", positional=True)
_PRINT_CONFIG = Argument(
    "print_config", switch(), "print the resolved configuration as JSON and stop", False, "run"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough: `perennial list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # tyro has printed a command's help
        return int(stop.code or 0)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        import importlib.metadata

        print("perennial-rl", importlib.metadata.version("perennial-rl"))
        return 0
    if words[0] not in COMMANDS:
        raise UsageError(f"unknown command {shown(words[0])}{nearest(words[0], COMMANDS)}")
    return COMMANDS[words[0]][0](words[1:])


def _overview() -> str:
    lines = ["usage: perennial COMMAND ...", ""]
    lines += [f"  {name:<9} {about}" for name, (_, about) in COMMANDS.items()]
    lines += ["", "`perennial COMMAND --help` tells more."]
    return "\n".join(lines)


def _train(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print("usage: perennial train AGENT ...", "", sep="\n")
        for name in AGENTS:
            print(f"  {name:<9} {agent_line(name)}")
        print("", "`perennial train AGENT --help` shows its options.", sep="\n")
        return 0
    if not words or words[0].startswith("-"):
        raise UsageError(f"name the agent first, as in `perennial train {next(iter(AGENTS))} ...`")
    agent, *words = words
    command, about = f"perennial train {agent}", agent_line(agent)
    given = parse(command, about, [*_options(agent, words), _PRINT_CONFIG], words)
    print_config = given.pop("print_config", False)
    config = build_config(agent, given=given)
    if print_config:
        print(json.dumps(to_json(config), indent=2))
        return 0
    from perennial.agents import run

    return run.train(config)[1]


def _options(agent: str, words: list[str]) -> list[Argument]:
    """The agent's options by topic; with a preset, the help shows its values as defaults."""
    base = config_class(agent)()
    for word, after in itertools.pairwise([*words, ""]):
        flag, equals, name = word.partition("=")
        if flag == "--preset" and (equals or after):
            base = build_config(agent, preset=name if equals else after)
    options = [
        Argument(
            field.name,
            field.metadata["kind"],
            field.metadata["help"],
            getattr(base, field.name),
            field.metadata["group"],
        )
        for field in dataclasses.fields(base)
    ]
    return sorted(options, key=lambda option: GROUPS.index(option.group))


def _resume(words: list[str]) -> int:
    given = parse_values(
        "perennial resume",
        "Go on with a run from its newest good checkpoint, to the same result as without a stop.",
        [_DIR, Argument("steps", whole(), "env steps per seed to go on to (default: as started)")],
        words,
    )
    path = _needed("resume", given["dir"])
    from perennial.agents import run

    return run.resume(path, given["steps"])


def _evaluate(words: list[str]) -> int:
    given = parse_values(
        "perennial evaluate",
        "Play the trained agent, without noise in its actions; nothing is learned.",
        [
            _DIR,
            Argument("episodes", whole(1, 10**6), "whole episodes for each seed", 10),
            Argument("task", whole(0), "task of the schedule (default: the one training reached)"),
            Argument("video", text("FILE.mp4"), "film the first episode of each seed"),
        ],
        words,
    )
    path = _needed("evaluate", given["dir"])
    from perennial.agents import run

    if given["video"] is not None:
        from perennial.agents.video import check_video

        check_video(given["video"])
    # What is no run, or has no such task, is refused before torch is imported.
    run.Run.open(path).check_task(given["task"])
    from perennial.agents import evaluate

    return evaluate.main(path, given["episodes"], given["task"], sys.stdout, given["video"])


def _list(words: list[str]) -> int:
    topic = parse_values(
        "perennial list",
        "What there is, by topic; without a word all of it.",
        [Argument("topic", choice(*TOPICS), ", ".join(TOPICS), positional=True)],
        words,
    )["topic"]
    from perennial.agents import listing

    for name in [topic] if topic else TOPICS:
        if not topic:
            print(f"{name}:")
        for line in listing.lines(name):
            print(line if topic else f"  {line}")
        if not topic and name != TOPICS[-1]:
            print()
    return 0


def _bench(words: list[str]) -> int:
    from perennial.agents import bench

    given = parse_values(
        "perennial bench",
        "Measure speed against peers on this machine: " + ", ".join(bench.BENCHES),
        [
            Argument("name", specs(), "which benchmarks (default: all)", (), positional=True),
            Argument("json", text("FILE"), "also write the numbers to this file"),
        ],
        words,
    )
    return bench.main(list(given["name"]), given["json"], sys.stdout)


def agent_line(agent: str) -> str:
    """One line about an agent."""
    return (config_class(agent).__doc__ or "").splitlines()[0]


def _needed(command: str, path: str | None) -> str:
    if path is None:
        raise UsageError(f"name the run's folder, as in `perennial {command} runs/...`")
    return path


# A command appears here when it works.
COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train an agent: " + ", ".join(AGENTS)),
    "resume": (_resume, "go on with a run from its newest checkpoint"),
    "evaluate": (_evaluate, "play what was trained"),
    "list": (_list, "what there is: " + ", ".join(TOPICS)),
    "bench": (_bench, "measure speed against peers on this machine"),
}
