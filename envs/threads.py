"""Jobs shared among threads: the next one goes to the next free thread.

Worth it where a job releases the GIL for most of its time, as `mj_step` does.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from threading import Thread
from typing import Any

Work = Callable[[int], int | None]


def _drain(work: Work, jobs: deque[int]) -> None:
    while True:
        try:
            job = jobs.popleft()  # atomic: no two threads get the same job
        except IndexError:
            return
        rest = work(job)
        if rest is not None:
            jobs.append(rest)


def _serve(inbox: "SimpleQueue[Any]", done: "SimpleQueue[BaseException | None]") -> None:
    while (call := inbox.get()) is not None:
        try:
            _drain(*call)
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)
        del call  # an idle thread must not keep an environment alive


def _stop(inbox: "SimpleQueue[Any]", threads: int) -> None:
    for _ in range(threads):
        inbox.put(None)


class JobThreads:
    """Runs jobs on the calling thread and `threads - 1` more, which start at first use."""

    def __init__(self, threads: int) -> None:
        self._helpers = threads - 1
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._started = False
        # Ends the helpers with close() as well as with the last reference.
        self.close = weakref.finalize(self, _stop, self._inbox, self._helpers)

    def run(self, work: Work, jobs: Iterable[int]) -> None:
        """Call `work(job)` for every job, and for the rest that a call returns in place of None.

        Waits for all; raises what they raise. A rest goes behind all other jobs: when they are
        few, cutting off the last bit of each keeps threads from waiting for the slowest.
        """
        if not self._started:
            self._started = True
            for _ in range(self._helpers):
                Thread(target=_serve, args=(self._inbox, self._done), daemon=True).start()
        shared = deque(jobs)
        for _ in range(self._helpers):
            self._inbox.put((work, shared))
        errors: list[BaseException] = []
        try:
            _drain(work, shared)
        finally:
            errors += [error for _ in range(self._helpers) if (error := self._done.get())]
        if errors:
            raise errors[0]
