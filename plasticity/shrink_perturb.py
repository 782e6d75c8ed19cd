"""Shrink and perturb: weights shrink and fresh noise joins them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.draws import Stream
from perennial.plasticity.fresh import Slot, forget, fresh, parameters_of, put, slots_of
from perennial.plasticity.heads import head_slots
from perennial.plasticity.registry import check, default
from perennial.plasticity.timing import Due, Timing, stream_of
from perennial.plasticity.units import Units

_LEAST = 0.2  # of the dormancy variant: never shrink further
_DORMANT = 0.025  # its threshold
_SCOPES = {"weights": ("weight",), "layers": ("weight", "bias")}


class ShrinkPerturb(Intervention):
    """`w <- shrink * w + noise * psi`, psi drawn as the layer was initialised.

    Ash & Adams, On Warm-Starting Neural Network Training, NeurIPS 2020 (arXiv 1910.08475). The
    variants in use, as parameters:

        Ash & Adams, at a change            shrink=0.4,noise=0.1,every=0,change=true,optimizer=reset
        SR-SPR (D'Oro et al. 2023)          shrink=0.8,noise=0.2,every=40000,head=reset
        BBF (Schwarzer et al. 2023)         shrink=0.5,noise=0.5,every=40000,head=reset
        DrM (Xu et al. 2024)                adapt=dormancy,shrink=0.9,every=50000,optimizer=reset
        soft (Juliani & Ash 2024)           shrink=0.999999,noise=0.000001,every=1
        Nature 632, with `l2`               shrink=1,noise=0.00001,every=1,draw=normal

    SR-SPR and BBF: arXiv 2305.19452, DrM: 2310.19668, soft: 2405.19153. With `shrink + noise = 1`
    weights settle at sqrt((1 - shrink) / (1 + shrink)) of their initial scale;
    `noise = sqrt(1 - shrink^2)` keeps it. The default is that of SR-SPR without its reset of heads,
    which also PPO survives.

    Args:
        shrink: factor of the weights.
        noise: factor of psi.
        every: steps of the optimizer between events; 0 for none by count. See `Timing` for PPO.
        change: also when the host tells of a change.
        times: at most so many events; 0 for any number.
        draw: psi is "init", a fresh draw; "normal", standard normal (`noise` is then a standard
            deviation, in units of weights); or "initial": the weights when attached, as some code
            has it, a pull to the start without noise.
        scope: "weights" only, "layers": their biases too, or "all" parameters: gains of norms and
            log standard deviations too, whose psi is their initial value.
        head: output layers do as the others ("shrink"), start anew with clear moments ("reset"), or
            stay ("keep").
        adapt: "none", or "dormancy": the factor is `clip(1 - 2 * dormant fraction, 0.2, shrink)`
            per copy, and `noise` what is left to 1.
        optimizer: "keep" its state, or "reset" it at every event.

    Target networks get the same with noise of their own, as in BBF.

    Deviations: dormancy is that of hidden units after their nonlinearity (DrM: pre-activations,
    outputs too); running statistics of norms stay.

    Every weight gets its own noise at every event, which costs about as much as an update, and
    several with `draw=init`. To the same effect as the soft variant's, in its mean and variance:
    `shrink=0.99968,noise=0.0000179,every=320`.
    """

    name: ClassVar[str] = "shrink-perturb"
    stage: ClassVar[Stage] = Stage.NOISE
    observes: ClassVar[bool] = True  # for dormancy
    events: Tensor

    def __init__(
        self,
        shrink: float = default("shrink-perturb", "shrink"),
        noise: float = default("shrink-perturb", "noise"),
        every: int = default("shrink-perturb", "every"),
        change: bool = default("shrink-perturb", "change"),
        times: int = default("shrink-perturb", "times"),
        draw: str = default("shrink-perturb", "draw"),
        scope: str = default("shrink-perturb", "scope"),
        head: str = default("shrink-perturb", "head"),
        adapt: str = default("shrink-perturb", "adapt"),
        optimizer: str = default("shrink-perturb", "optimizer"),
    ) -> None:
        super().__init__()
        numbers = {"shrink": shrink, "noise": noise, "every": every, "change": change}
        words = {"draw": draw, "scope": scope, "head": head, "adapt": adapt, "optimizer": optimizer}
        check(self.name, numbers | {"times": times} | words)
        self.shrink, self.noise, self.draw = shrink, noise, draw
        self.timing = Timing(every, change, times)
        self.scope, self.head, self.adapts = scope, head, adapt == "dormancy"
        self.forgets = optimizer == "reset"
        self._slots: list[Slot] = []
        self._heads: list[Slot] = []

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        every = slots_of(units, optimizer, self.targets)
        self._slots = [s for s in every if self.scope == "all" or s.kind in _SCOPES[self.scope]]
        if self.head != "shrink":
            heads = head_slots(units, every, 1)
            self._slots = [slot for slot in self._slots if slot not in heads]
            self._heads = heads if self.head == "reset" else []
        self.register_buffer("events", torch.zeros_like(self.clock.updates))
        self.timing.reload(self.events)
        for slot in self._slots:
            if self.draw == "initial" or (slot.kind == "other" and self.draw == "init"):
                self.register_buffer(f"initial{slot.place}", slot.lead.clone())

    def _loaded(self) -> None:
        self.timing.reload(self.events)

    def after_step(self) -> None:
        due = self.timing.due(self.clock, self.events)
        if due is not None:
            self._act(due)

    def on_change(self) -> None:
        due = self.timing.told(self.clock, self.events)
        if due is not None:
            self._act(due)

    def _act(self, due: Due) -> None:
        stream = stream_of(self.key, self.events)
        self._mix(due, stream)
        for slot in self._heads:
            put(slot.lead, fresh(slot, stream), due.copies)
            for value in slot.target_leads:
                put(value, slot.lead, due.copies)
        if self.forgets:
            forget(self._optimizer, parameters_of(self._optimizer), due.copies)
            self.moments.restart(due.copies)
        elif self._heads:
            forget(self._optimizer, [slot.parameter for slot in self._heads], due.copies)
        self.events.add_(due.copies)

    def _mix(self, due: Due, stream: Stream) -> None:
        """Shrink and perturb the model, then each target."""
        if self.shrink == 1 and self.noise == 0 and not self.adapts:
            return
        shrink, noise = self._factors()
        everyone = due.which is not None and len(due.which) == self.clock.copies
        for which in range(1 + len(self.targets)):
            leads = [s.target_leads[which - 1] if which else s.lead for s in self._slots]
            draws = self._draws(leads, stream.fold(which + 1)) if self.noise or self.adapts else []
            for place, value in enumerate(leads):
                # In place where nothing has to be kept: every step's noise touches all memory.
                new = value if everyone else value.clone()
                new.mul_(_per_copy(shrink, value))
                if draws:
                    new.add_(draws[place].mul(_per_copy(noise, value)))
                if not everyone:
                    put(value, new, due.copies)

    def _factors(self) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """Of weights and of psi: numbers, or `[S]`."""
        if not self.adapts:
            return self.shrink, self.noise
        dormant = torch.zeros(self.clock.copies, dtype=torch.int64, device=self.units.device)
        for site in self.units:
            size = site.activation.abs().mean(1)
            dormant = dormant + (size <= _DORMANT * size.mean(-1, keepdim=True)).sum(-1)
        share = dormant.double() / max(self.units.total, 1)
        factor = (1 - 2 * share).clamp(min(_LEAST, self.shrink), self.shrink)
        return factor, 1 - factor

    def _draws(self, leads: list[Tensor], stream: Stream) -> list[Tensor]:
        """psi of every slot."""
        if self.draw == "normal":
            sizes = [value[0].numel() for value in leads]
            parts = stream.normal(sum(sizes), self.units.dtype).split(sizes, -1)
            return [p.view_as(v).to(v.dtype) for p, v in zip(parts, leads, strict=True)]
        kept = {name: value for name, value in self.named_buffers(recurse=False)}
        return [
            kept[name] if (name := f"initial{slot.place}") in kept else fresh(slot, stream)
            for slot in self._slots
        ]


def _per_copy(factor: float | Tensor, value: Tensor) -> float | Tensor:
    """A number, or one per copy, as it multiplies `[S, ...]`."""
    if not isinstance(factor, Tensor):
        return factor
    return factor.to(value.dtype).view(-1, *[1] * (value.ndim - 1))
