"""How a run is going: a bar on a terminal, a plain line now and then elsewhere.

with Progress(steps, seeds, sys.stdout) as progress:
    progress.update({"seed": 0, "env_steps": 2048, "task": 0, "return": 12.5, "fps": 2100.0})
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    import rich.progress

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Sums up what the seeds report.

    Args:
        steps: env steps that each seed goes to.
        seeds: the seeds of the run.
        stream: where to show it; a terminal gets a bar.
        clock: seconds, for the pace of plain lines.
    """

    def __init__(
        self,
        steps: int,
        seeds: Sequence[int],
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.steps = steps
        self.stream = stream
        self._clock = clock
        self._latest: dict[int, Mapping[str, Any]] = {}
        self._seeds = len(seeds)
        self._last_line = -float("inf")
        self._unshown = False
        self._bar: rich.progress.Progress | None = _bar(stream) if stream.isatty() else None
        if self._bar is not None:
            self._bar_task = self._bar.add_task("", total=steps, speed="", left="-:--:--")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._unshown:  # the last word of a run is worth a line whenever it comes
            print(self.line(), file=self.stream, flush=True)

    def update(self, message: Mapping[str, Any]) -> None:
        """Take a seed's report: seed, env_steps, task, return (None: no episode ended yet), fps.

        And a task's name, where it has one.
        """
        self._latest[message["seed"]] = message
        if self._bar is not None:
            self._bar.update(
                self._bar_task,
                completed=self._env_steps(),
                description=self._state(),
                speed=f"{self._speed():,.0f} steps/s",
                left=_clock_time(self._seconds_left()),
            )
            return
        now = self._clock()
        self._unshown = now - self._last_line < _SECONDS_BETWEEN_LINES
        if not self._unshown:
            self._last_line = now
            print(self.line(), file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """Show a line of text, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def line(self) -> str:
        """Everything known, on one line."""
        done = self._env_steps()
        percent = min(100.0, 100 * done / self.steps)  # the last rollout may overshoot
        each = " each" if self._seeds > 1 else ""
        left = _clock_time(self._seconds_left())
        return (
            f"{percent:5.1f} %  {done:,.0f} of {self.steps:,} env steps{each}  "
            f"{self._speed():,.0f} steps/s  ETA {left}  {self._state()}"
        )

    def _env_steps(self) -> float:
        """Mean over the seeds, those that have not reported yet at 0."""
        return sum(m["env_steps"] for m in self._latest.values()) / self._seeds

    def _speed(self) -> float:
        """Env steps per second of all seeds that are still at work."""
        latest = self._latest.values()
        return sum(m["fps"] for m in latest if m["env_steps"] < self.steps) or sum(
            m["fps"] for m in latest
        )

    def _seconds_left(self) -> float | None:
        """Until the slowest seed is through; None while unknown."""
        if len(self._latest) < self._seeds or any(m["fps"] <= 0 for m in self._latest.values()):
            return None
        return max(max(0, self.steps - m["env_steps"]) / m["fps"] for m in self._latest.values())

    def _state(self) -> str:
        latest = self._latest.values()
        tasks = sorted({m["task"] for m in latest})
        returns = [m["return"] for m in latest if m["return"] is not None]
        task = f"task {tasks[0]}" if len(tasks) == 1 else f"tasks {tasks[0]}-{tasks[-1]}"
        names = {m.get("name") for m in latest} - {None}
        if len(names) == 1:
            task += f" ({names.pop()})"
        return f"{task}  return {sum(returns) / len(returns):.1f}" if returns else task


def _clock_time(seconds: float | None) -> str:
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _bar(stream: TextIO) -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TaskProgressColumn(),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("ETA {task.fields[left]}"),
        TextColumn("{task.description}"),
        console=Console(file=stream),
        refresh_per_second=4,
    )
