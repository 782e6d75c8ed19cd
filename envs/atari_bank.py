"""Consoles in rows, on several cores: the caller plays some and helper processes the others.

Processes, because ale-py's emulator holds the GIL while it runs: threads gain nothing. Its own
vector environment runs threads in C++, but neither its state nor its stickiness can be saved.
A helper costs 0.1 ms a step, talks over pipes, and ends when its caller does, however that ends.
"""

import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium.utils import seeding

from perennial.envs.atari import AtariLane, Emulators, Frame
from perennial.envs.atari_games import SIDE, Entry


class Step(NamedTuple):
    """What a step of one lane returned."""

    points: float
    terminated: bool
    truncated: bool
    lives: int
    frames: int  # of the episode


class Row:
    """Some lanes, played one after the other. Lanes are counted from 0 within a row."""

    def __init__(self, num: int, frame_skip: int, stickiness: float, max_frames: int) -> None:
        emulators = Emulators()
        self.lanes = [AtariLane(emulators, frame_skip, stickiness, max_frames) for _ in range(num)]
        self._pictures = np.zeros((num, SIDE, SIDE), np.uint8)

    def step(self, actions: Sequence[int]) -> tuple[Frame, list[Step]]:
        """One step of every lane: pictures [num, 84, 84], which the next call writes again."""
        steps = [
            Step(*lane.step(action, out), lane.lives(), lane.frames)
            for lane, action, out in zip(self.lanes, actions, self._pictures, strict=True)
        ]
        return self._pictures, steps

    def start(self, starts: Sequence[tuple[int, Entry]]) -> list[tuple[Frame, int, int]]:
        """Start episodes: each lane's picture [84, 84], lives and frames."""
        for lane, entry in starts:
            self.lanes[lane].start(entry, self._pictures[lane])
        played = [(lane, self.lanes[lane]) for lane, _ in starts]
        return [(self._pictures[i], lane.lives(), lane.frames) for i, lane in played]

    def seed(self, seeds: Sequence[tuple[int, int]]) -> list[None]:
        """Seed the stickiness of lanes."""
        for lane, number in seeds:
            self.lanes[lane].seed(seeding.np_random(number)[0])
        return [None] * len(seeds)

    def render(self, lanes: Sequence[tuple[int]]) -> list[Frame]:
        """Each lane's picture in colour."""
        return [self.lanes[lane].render() for (lane,) in lanes]

    def get_state(self, lanes: Sequence[tuple[int]]) -> list[dict[str, Any]]:
        """Each lane's `AtariLane.get_state`."""
        return [self.lanes[lane].get_state() for (lane,) in lanes]

    def set_state(self, states: Sequence[tuple[int, Entry, dict[str, Any]]]) -> list[None]:
        """Each lane's `AtariLane.set_state`."""
        for lane, entry, state in states:
            self.lanes[lane].set_state(entry, state)
        return [None] * len(states)


class Caller(Protocol):
    """Where a row is: here, or in a helper."""

    def send(self, method: str, *args: Any) -> None:
        """Begin a call of the row's method."""

    def receive(self) -> Any:
        """Its result."""


class _Here:
    def __init__(self, *args: Any) -> None:
        self.row = Row(*args)

    def send(self, method: str, *args: Any) -> None:
        self._call = getattr(self.row, method), args

    def receive(self) -> Any:
        method, args = self._call
        return method(*args)


class _Helper:
    def __init__(self, *args: Any) -> None:
        code = "from perennial.envs.atari_bank import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.close = weakref.finalize(self, _end, self._process)
        self._write(args)

    def send(self, method: str, *args: Any) -> None:
        self._write((method, args))

    def receive(self) -> Any:
        try:
            failure, result = pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._gone() from None
        if failure is not None:
            raise ValueError(result) if failure == "ValueError" else RuntimeError(result)
        return result

    def _write(self, call: Any) -> None:
        pipe: Any = self._process.stdin
        try:
            pickle.dump(call, pipe, protocol=5)
            pipe.flush()
        except OSError:
            raise self._gone() from None

    def _gone(self) -> RuntimeError:
        status = self._process.wait(timeout=10)
        return RuntimeError(f"a helper process of the Atari environment ended (status {status})")


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()  # type: ignore[union-attr]
        except OSError:
            pass  # it ended before: nothing left to flush to
    process.wait()


def serve() -> None:
    """What a helper does: calls of a row from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's business
    calls = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write among the replies
    row = Row(*pickle.load(calls))
    while True:
        try:
            method, args = pickle.load(calls)
        except EOFError:
            return
        reply: tuple[str | None, Any]
        try:
            reply = (None, getattr(row, method)(*args))
        except Exception as error:
            reply = (type(error).__name__, str(error))
        try:
            pickle.dump(reply, replies, protocol=5)
            replies.flush()
        except BrokenPipeError:  # the caller is gone
            return


class AtariBank:
    """All lanes of a vector environment, spread over `threads` cores.

    Args:
        num: Lanes.
        threads: Cores: this process and `threads - 1` helpers, never more than lanes.
        frame_skip, stickiness, max_frames: See `AtariLane`.
    """

    def __init__(
        self, num: int, threads: int, frame_skip: int, stickiness: float, max_frames: int
    ) -> None:
        bounds = np.linspace(0, num, min(num, max(threads, 1)) + 1).astype(int).tolist()
        self._spans = [range(a, b) for a, b in pairwise(bounds)]
        rest = (frame_skip, stickiness, max_frames)
        self._helpers = [_Helper(len(span), *rest) for span in self._spans[1:]]
        here = _Here(len(self._spans[0]), *rest)
        # It works when it is asked for its results: first, while the helpers do.
        self._callers: list[Caller] = [here, *self._helpers]
        self._place = {
            lane: (caller, lane - span.start)
            for caller, span in enumerate(self._spans)
            for lane in span
        }

    def step(self, actions: Sequence[int], out: Frame) -> list[Step]:
        """One step of every lane; pictures into `out` [num, 84, 84]."""
        for caller, span in zip(self._callers, self._spans, strict=True):
            caller.send("step", actions[span.start : span.stop])
        steps: list[Any] = [None] * len(out)
        for span, result in zip(self._spans, self._results(self._callers), strict=True):
            out[span.start : span.stop], steps[span.start : span.stop] = result
        return steps

    def start(self, starts: Iterable[tuple[int, Entry]]) -> list[tuple[Frame, int, int]]:
        """Start episodes of (lane, entry): each one's picture [84, 84], lives and frames."""
        return self._each("start", starts)

    def seed(self, seeds: Iterable[tuple[int, int]]) -> None:
        """Seed the stickiness of (lane, number)."""
        self._each("seed", seeds)

    def get_state(self, lanes: Iterable[int]) -> list[dict[str, Any]]:
        """The lanes' states."""
        return self._each("get_state", ((lane,) for lane in lanes))

    def set_state(self, states: Iterable[tuple[int, Entry, dict[str, Any]]]) -> None:
        """Put (lane, entry, state)."""
        self._each("set_state", states)

    def render(self) -> list[Frame]:
        """Each lane's picture in colour."""
        return self._each("render", ((lane,) for lane in sorted(self._place)))

    def _each(self, method: str, jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Call a method with each caller's jobs (lane, ...); results in the order of the jobs."""
        jobs = list(jobs)
        shares: dict[int, list[int]] = {}
        for i, (lane, *_) in enumerate(jobs):
            shares.setdefault(self._place[lane][0], []).append(i)
        callers = sorted(shares)  # this process first
        for caller in callers:
            local = [(self._place[jobs[i][0]][1], *jobs[i][1:]) for i in shares[caller]]
            self._callers[caller].send(method, local)
        results: list[Any] = [None] * len(jobs)
        for caller, found in zip(
            callers, self._results([self._callers[i] for i in callers]), strict=True
        ):
            for i, result in zip(shares[caller], found, strict=True):
                results[i] = result
        return results

    def _results(self, callers: Sequence[Caller]) -> list[Any]:
        """What all calls returned; raises only when none is left unread."""
        results, errors = [], []
        for caller in callers:
            try:
                results.append(caller.receive())
            except (ValueError, RuntimeError) as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results

    def close(self) -> None:
        """End the helpers."""
        for helper in self._helpers:
            helper.close()
