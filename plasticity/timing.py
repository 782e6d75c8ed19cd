"""When methods act that act now and then: every so many steps, at a change, a number of times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.plasticity import draws
from perennial.plasticity.clock import Clock


@dataclass(frozen=True)
class Due:
    """Copies with an event now: bool `[S]`, and as host integers where the host knows."""

    copies: Tensor
    which: tuple[int, ...] | None


class Timing:
    """Events of a method. What is due must be done: it counts at once on the host, and on the
    device when the method adds `due.copies` to its buffer `events` `[S]`.

    Args:
        every: steps of the optimizer between events; 0 for none by count.
        change: also when the host tells of a change (`handle.on_change`).
        times: at most so many events per copy; 0 for any number.

    PPO and `every`: an event amid a rollout's minibatch steps changes the policy under stored log
    probabilities, ratios differ from 1 for no reason of the gradient, and a KL limit may stop the
    update. Multiples of the steps per rollout (`n_epochs * n_steps * num_envs / batch_size`: 320
    with Stable-Baselines3's defaults) fall between the update and the next rollout. All defaults
    here are multiples of 320.
    """

    def __init__(self, every: int, change: bool = False, times: int = 0) -> None:
        self.every, self.change, self.times = every, change, times
        self._host: list[int] | None = None  # events of each copy

    @property
    def never(self) -> bool:
        """Whether there is no event at all."""
        return self.every == 0 and not self.change

    @property
    def most(self) -> int | None:
        """Events of the copy with the most, of a limited method; None where the host does not
        know."""
        return None if self._host is None else max(self._host)

    def due(self, clock: Clock, events: Tensor) -> Due | None:
        """Asked in `after_step`; None when the host knows that no copy has an event."""
        if self.every == 0:
            return None
        due = clock.due(self.every)
        if due is None:
            return None
        known = clock.known
        if known is None:
            return self._blind(due, events)
        return self._left(due, [c for c in clock.current() if known[c] % self.every == 0], events)

    def told(self, clock: Clock, events: Tensor) -> Due | None:
        """Asked in `on_change`."""
        if not self.change:
            return None
        due = torch.ones_like(events, dtype=torch.bool)
        if clock.mask is not None:
            due = due & clock.mask
        if clock.known is None:
            return self._blind(due, events)
        return self._left(due, list(clock.current()), events)

    def reload(self, events: Tensor) -> None:
        """The number of events of each copy changed on the device."""
        self._host = events.tolist()

    def _blind(self, due: Tensor, events: Tensor) -> Due:
        self._host = None
        return Due(due & (events < self.times) if self.times else due, None)

    def _left(self, due: Tensor, copies: list[int], events: Tensor) -> Due | None:
        """Those of the copies that have not had all their events."""
        if not self.times:
            return Due(due, tuple(copies))
        if self._host is None:  # after steps that the host did not see
            self.reload(events)
        host = self._host
        assert host is not None
        which = tuple(copy for copy in copies if host[copy] < self.times)
        for copy in which:
            host[copy] += 1
        return Due(due & (events < self.times), which) if which else None


def stream_of(key: Tensor, events: Tensor) -> draws.Stream:
    """Random numbers of the coming event of each copy, from the method's key and the number of
    events before it: no two events draw the same."""
    return draws.Stream(draws.fold(draws.fold(key, _EVENT), events))


_EVENT = 5  # word of these streams under a method's key
