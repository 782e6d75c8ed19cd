"""Lanes shared among threads: the next free lane goes to the next free thread.

Worth it where the work per lane releases the GIL for most of its time, as `mj_step` does.
"""

import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any

Work = Callable[[int], None]


def _drain(work: Work, lanes: deque[int]) -> None:
    while True:
        try:
            lane = lanes.popleft()  # atomic: no two threads get the same lane
        except IndexError:
            return
        work(lane)


def _serve(jobs: "SimpleQueue[Any]", done: "SimpleQueue[BaseException | None]") -> None:
    while (job := jobs.get()) is not None:
        try:
            _drain(*job)
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)
        del job  # an idle thread must not keep an environment alive


def _stop(jobs: "SimpleQueue[Any]", threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)


class LaneThreads:
    """Runs work over lanes on the calling thread and `threads - 1` more, started at first use."""

    def __init__(self, threads: int) -> None:
        self._helpers = threads - 1
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._started = False
        # Ends the helpers with close() as well as with the last reference.
        self.close = weakref.finalize(self, _stop, self._jobs, self._helpers)

    def run(self, work: Work, num_lanes: int) -> None:
        """Call `work(lane)` once for every lane and wait for all; raises what they raise."""
        if not self._started:
            self._started = True
            for _ in range(self._helpers):
                Thread(target=_serve, args=(self._jobs, self._done), daemon=True).start()
        lanes = deque(range(num_lanes))
        for _ in range(self._helpers):
            self._jobs.put((work, lanes))
        errors: list[BaseException] = []
        try:
            _drain(work, lanes)
        finally:
            errors += [error for _ in range(self._helpers) if (error := self._done.get())]
        if errors:
            raise errors[0]
