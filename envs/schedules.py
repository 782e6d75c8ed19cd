"""When the world changes and what it changes to.

A schedule is a pure function of (env steps of the seed, schedule seed): every method trained on a
seed meets the same changes, in whatever order, process or resumed run it is asked. Values are drawn
by hashing (schedule seed, task), never from a stream that has to be wound forward.

A clock counts the env steps of one seed and says which task an episode that starts now belongs to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

KINDS = ("log-uniform", "list", "cycle", "linear", "sinusoidal")


def hashed_uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends only on (seed, index), both >= 0.

    53 bits of numpy's SeedSequence, whose output is guaranteed to stay the same across versions and
    platforms; Generator methods are not.
    """
    word = int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])
    return (word >> 11) * 2.0**-53


class Values(Protocol):
    """What one parameter of the world is worth in each task."""

    def value(self, task: int, env_steps: int, seed: int) -> float:
        """The value in `task`, which starts at `env_steps`, under schedule seed `seed`."""

    def tasks(self, change_every: int) -> int | None:
        """How many different tasks there are; None: no end."""


@dataclass(frozen=True)
class LogUniform:
    """A fresh draw per task, log-uniform on [low, high] (the published slippery ant: 0.02 to 2)."""

    low: float
    high: float

    def value(self, task: int, env_steps: int, seed: int) -> float:
        span = math.log(self.high) - math.log(self.low)
        drawn = math.exp(math.log(self.low) + hashed_uniform(seed, task) * span)
        return min(max(drawn, self.low), self.high)  # exp(log(x)) may leave the range by a rounding

    def tasks(self, change_every: int) -> int | None:
        return None


@dataclass(frozen=True)
class InTurn:
    """The given values one after the other; the last one stays. The same for every seed."""

    values: tuple[float, ...]

    def value(self, task: int, env_steps: int, seed: int) -> float:
        return self.values[min(task, len(self.values) - 1)]

    def tasks(self, change_every: int) -> int | None:
        return len(self.values)


@dataclass(frozen=True)
class Cycle:
    """The given values one after the other, over and over. The same for every seed."""

    values: tuple[float, ...]

    def value(self, task: int, env_steps: int, seed: int) -> float:
        return self.values[task % len(self.values)]

    def tasks(self, change_every: int) -> int | None:
        return None


@dataclass(frozen=True)
class Linear:
    """From `first` to `last` at an even pace over `period` env steps, then it stays."""

    first: float
    last: float
    period: int

    def value(self, task: int, env_steps: int, seed: int) -> float:
        done = min(env_steps / self.period, 1.0)
        return self.first * (1.0 - done) + self.last * done

    def tasks(self, change_every: int) -> int | None:
        return math.ceil(self.period / change_every) + 1


@dataclass(frozen=True)
class Sinusoidal:
    """Swings between `low` and `high` once in `period` env steps; the seed draws the start."""

    low: float
    high: float
    period: int

    def value(self, task: int, env_steps: int, seed: int) -> float:
        turn = (env_steps % self.period) / self.period + hashed_uniform(seed, 0)
        share = 0.5 + 0.5 * math.sin(2.0 * math.pi * turn)
        return self.low * (1.0 - share) + self.high * share

    def tasks(self, change_every: int) -> int | None:
        return None


@dataclass(frozen=True)
class Schedule:
    """Tasks of `change_every` env steps each, numbered from 0, with one value per task."""

    values: Values
    change_every: int
    seed: int = 0

    def task(self, env_steps: int) -> int:
        """The task after `env_steps` env steps. A schedule that comes to rest stays in its last."""
        task = env_steps // self.change_every
        last = self.last_task
        return task if last is None else min(task, last)

    @property
    def last_task(self) -> int | None:
        """The task that never ends; None where changes never stop."""
        tasks = self.values.tasks(self.change_every)
        return None if tasks is None else tasks - 1

    def value(self, task: int) -> float:
        """The parameter's value all through `task`; drifts move in steps of `change_every`."""
        return self.values.value(task, task * self.change_every, self.seed)


def make_values(
    kind: str, span: tuple[float, float], listed: Sequence[float] | None, period: int | None
) -> Values:
    """Values of the named kind.

    Args:
        kind: One of `KINDS`.
        span: (low, high) of draws and swings, (first, last) of a linear drift.
        listed: The values of "list" and "cycle".
        period: Env steps of a linear drift or of one swing.

    Raises:
        ValueError: The kind lacks what it needs, or was given what it cannot use.
    """
    if kind in ("list", "cycle"):
        if not listed:
            raise ValueError(f"schedule={kind} needs its values: give frictions=0.02,0.5,2 or so")
        return InTurn(tuple(listed)) if kind == "list" else Cycle(tuple(listed))
    if listed:
        raise ValueError(f"schedule={kind} takes no frictions: give schedule=list or cycle")
    if kind in ("linear", "sinusoidal"):
        if period is None:
            raise ValueError(f"schedule={kind} needs period=ENV_STEPS, the length of the drift")
        return Linear(*span, period) if kind == "linear" else Sinusoidal(*span, period)
    if period is not None:
        raise ValueError(f"schedule={kind} takes no period: give schedule=linear or sinusoidal")
    return LogUniform(*span)


class Clock:
    """Counts one seed's env steps and says which task an episode that starts now belongs to.

    Args:
        schedule: The seed's schedule.
        reference: None: the task is `env_steps // change_every`, so a long episode may skip a task.
            "nature": as in the published slippery ant, a change happens at the first episode end
            more than (not at) `change_every` env steps after the last change; no task is skipped.
        hold: Stay in this task for ever (evaluation); None follows the schedule.
    """

    def __init__(
        self, schedule: Schedule, reference: str | None = None, hold: int | None = None
    ) -> None:
        self.schedule = schedule
        self._reference = reference
        self._hold = hold
        self.restart()

    def restart(self) -> None:
        """Back to env step 0."""
        self.env_steps = 0
        self._counted = 0  # reference="nature": changes so far, and when the last one was
        self._last_change = 0
        self._next = self._following_change()

    @property
    def task(self) -> int:
        """The schedule's task now. A lane enters it at its own next episode."""
        if self._hold is not None:
            return self._hold
        if self._reference == "nature":
            return self._counted
        return self.schedule.task(self.env_steps)

    @property
    def value(self) -> float:
        """The parameter's value in `task`."""
        return self.schedule.value(self.task)

    def advance(self, steps: int) -> bool:
        """Count `steps` env steps more; True: they crossed into another task of the schedule."""
        self.env_steps += steps
        if self._next is None or self.env_steps < self._next:
            return False
        self._next = self._following_change()
        return True

    def episode_end(self) -> int:
        """The task of the episode that starts now; with reference="nature" changes happen here."""
        if self._reference == "nature" and self._hold is None:
            due = self.env_steps - self._last_change > self.schedule.change_every
            if due and self._counted != self.schedule.last_task:
                self._last_change = self.env_steps
                self._counted += 1
        return self.task

    def _following_change(self) -> int | None:
        """The env step at which the pure schedule changes next; None where it never does."""
        if self._hold is not None or self._reference == "nature":
            return None
        task = self.schedule.task(self.env_steps)
        if task == self.schedule.last_task:
            return None
        return (task + 1) * self.schedule.change_every

    def get_state(self) -> dict[str, Any]:
        """Everything that `set_state` needs to go on from here."""
        return {
            "env_steps": self.env_steps,
            "counted": self._counted,
            "last_change": self._last_change,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a `get_state`."""
        self.env_steps = int(state["env_steps"])
        self._counted = int(state["counted"])
        self._last_change = int(state["last_change"])
        self._next = self._following_change()
