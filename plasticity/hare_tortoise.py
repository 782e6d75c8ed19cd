"""Hare and tortoise: fast weights train, slow weights follow, and now and then take over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.fresh import forget, lead, parameters_of, put, slots_of
from perennial.plasticity.registry import check, default
from perennial.plasticity.timing import Due, Timing
from perennial.plasticity.units import Units


class HareTortoise(Intervention):
    """Lee et al., Slow and Steady Wins the Race: Maintaining Plasticity with Hare and Tortoise
    Networks, ICML 2024 (arXiv 2406.02596).

    The hare is the network that trains. The tortoise, kept here, is a running average of its
    parameters and floating-point buffers: every step `t <- momentum * t + (1 - momentum) * h`; at
    every event `h <- t`, by copy. It starts as the hare stands when attached.

    Args:
        every: steps of the optimizer between events; 0 for none by count. See `Timing` for PPO.
        momentum: of the average; 0.999 remembers about 1000 steps.
        change: also when the host tells of a change.
        optimizer: "keep" its state at events, or "reset" it.

    Evaluate the slow weights with `with method.swapped(): ...`.

    Deviations: the published code fires at step 0 too, averages integer counters (here they stay
    the hare's), and aliases the two networks at events, so that one average is lost.
    """

    name: ClassVar[str] = "hare-tortoise"
    stage: ClassVar[Stage] = Stage.AVERAGE
    events: Tensor

    def __init__(
        self,
        every: int = default("hare-tortoise", "every"),
        momentum: float = default("hare-tortoise", "momentum"),
        change: bool = default("hare-tortoise", "change"),
        optimizer: str = default("hare-tortoise", "optimizer"),
    ) -> None:
        super().__init__()
        given = {"every": every, "momentum": momentum, "change": change, "optimizer": optimizer}
        check(self.name, given)
        self.momentum, self.timing = momentum, Timing(every, change)
        self.forgets = optimizer == "reset"
        self._sources: list[tuple[Tensor, bool]] = []
        self._tortoise: list[Tensor] = []

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        slots = slots_of(units, optimizer)
        self._sources = [(slot.parameter, slot.batched) for slot in slots]
        owned = {slot.parameter for slot in slots}
        # Running statistics belong to the optimizer that trains their module.
        modules = [m for m in units.model.modules() if owned.issuperset(m.parameters(False))]
        buffers = {b: None for m in modules for b in m.buffers(False) if b.is_floating_point()}
        for buffer in buffers:
            batched = units.batched and buffer.ndim > 0 and len(buffer) == units.copies
            if units.copies == 1 or batched:
                self._sources.append((buffer, batched))
        for place, value in enumerate(self._hare()):
            self.register_buffer(f"tortoise{place}", value.clone())
        self.register_buffer("events", torch.zeros_like(self.clock.updates))
        self.timing.reload(self.events)
        self._tortoise = [self.get_buffer(f"tortoise{p}") for p in range(len(self._sources))]

    def _hare(self) -> list[Tensor]:
        """The model's tensors, the copies axis first: views."""
        return [lead(tensor, batched) for tensor, batched in self._sources]

    def _restarted(self, copies: Tensor) -> None:
        for slow, fast in zip(self._tortoise, self._hare(), strict=True):
            put(slow, fast, copies)

    def _loaded(self) -> None:
        self.timing.reload(self.events)

    def after_step(self) -> None:
        if self.clock.mask is None:
            torch._foreach_lerp_(self._tortoise, self._hare(), 1 - self.momentum)
        else:
            for slow, fast in zip(self._tortoise, self._hare(), strict=True):
                put(slow, torch.lerp(slow, fast, 1 - self.momentum), self.clock.mask)
        due = self.timing.due(self.clock, self.events)
        if due is not None:
            self._take_over(due)

    def on_change(self) -> None:
        due = self.timing.told(self.clock, self.events)
        if due is not None:
            self._take_over(due)

    def _take_over(self, due: Due) -> None:
        for slow, fast in zip(self._tortoise, self._hare(), strict=True):
            put(fast, slow, due.copies)
        if self.forgets:
            forget(self._optimizer, parameters_of(self._optimizer), due.copies)
            self.moments.restart(due.copies)
        self.events.add_(due.copies)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model with the slow weights, for evaluation; no training inside."""
        fast = [value.clone() for value in self._hare()]
        torch._foreach_copy_(self._hare(), self._tortoise)
        try:
            yield
        finally:
            torch._foreach_copy_(self._hare(), fast)
