"""When methods act that act now and then: every so many steps, at a change, a number of times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.plasticity import draws
from perennial.plasticity.clock import Clock


@dataclass(frozen=True)
class Timing:
    """Events of a method.

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

    every: int
    change: bool = False
    times: int = 0

    @property
    def never(self) -> bool:
        """Whether there is no event at all."""
        return self.every == 0 and not self.change

    def due(self, clock: Clock, events: Tensor) -> Tensor | None:
        """Copies `[S]` with an event now, in `after_step`; None when the host knows of none."""
        if self.every == 0:
            return None
        due = clock.due(self.every)
        return due if due is None else self._left(due, events)

    def told(self, events: Tensor) -> Tensor | None:
        """Copies `[S]` with an event, in `on_change`."""
        if not self.change:
            return None
        return self._left(torch.ones_like(events, dtype=torch.bool), events)

    def _left(self, due: Tensor, events: Tensor) -> Tensor:
        return due & (events < self.times) if self.times else due


def stream_of(key: Tensor, events: Tensor) -> draws.Stream:
    """Random numbers of the coming event of each copy, from the method's key and the number of
    events before it: no two events draw the same."""
    return draws.Stream(draws.fold(draws.fold(key, _EVENT), events))


_EVENT = 5  # word of these streams under a method's key
