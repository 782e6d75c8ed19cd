"""Self-normalised resets: a unit that is silent for longer than is usual for it starts anew."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity import dormancy
from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.registry import check as check_params
from perennial.plasticity.registry import default
from perennial.plasticity.surgery import Selection
from perennial.plasticity.units import Units

_EXACT, _PER_OCTAVE = 16, 8  # silences up to here are counted one by one, longer ones in bins
_ROUNDING = 1e-9  # of percentile * count


class SelfNormalizedResets(Intervention):
    """Farias & Jozefiak, Self-normalized resets for plasticity in continual learning, ICLR 2025
    (arXiv 2410.20098).

    A unit fires in a step if its activation is positive for any row of the minibatch. A unit that
    has been silent for `tau` steps, a number of its own, is taken for dead: fresh incoming weights,
    its initial bias, silent outgoing weights. Every `every` steps tau follows the unit's silences
    since the last time: their percentile where that is less, else twice tau.

    Args:
        percentile: of a unit's own silences that a reset has to reach. 1: nothing ever happens.
        initial: tau of every unit at first, in steps of the optimizer.
        every: steps between changes of tau (the published runs: 16 tasks of 600 minibatches).
        minimum, maximum: bounds of tau in steps.
        check: steps between looks for units that are due. 1 is the published rule; each look costs
            about as much as a step of the optimizer.
        moments: what becomes of the optimizer's averages: "exact" (stepped as newborn), "zero"
            (only zeroed, as published), "keep".

    Deviations: time is counted in steps, not samples. The published estimate takes a unit that was
    never silent for one with the shortest tau, and trusts a percentile of a handful of silences;
    here tau shrinks only on at least `1 / (1 - percentile)` of them and stays without any. Silences
    longer than 16 steps are counted in bins of 12 % or less, not one by one. Of a CReLU both halves
    count, of a channel all positions. Sites with an obstacle (residual streams) are left out.
    """

    name: ClassVar[str] = "snr"
    stage: ClassVar[Stage] = Stage.RECYCLE
    observes: ClassVar[bool] = True

    silent: Tensor  # int64 [S, total]: steps since the unit fired
    tau: Tensor  # int64 [S, total]
    silences: Tensor  # int32 [S, total, bins]: how many of which length ended since tau changed
    replaced: Tensor

    def __init__(
        self,
        percentile: float = default("snr", "percentile"),
        initial: int = default("snr", "initial"),
        every: int = default("snr", "every"),
        minimum: int = default("snr", "minimum"),
        maximum: int = default("snr", "maximum"),
        check: int = default("snr", "check"),
        moments: str = default("snr", "moments"),
    ) -> None:
        super().__init__()
        given = {"percentile": percentile, "initial": initial, "every": every, "minimum": minimum}
        check_params("snr", given | {"maximum": maximum, "check": check, "moments": moments})
        if not minimum <= initial <= maximum:
            raise ValueError(
                f"snr: initial={initial} must lie between minimum={minimum} and maximum={maximum}"
            )
        self.percentile, self.initial, self.every = percentile, initial, every
        self.minimum, self.maximum = minimum, maximum
        self.check, self.treatment = check, moments

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._sites = dormancy.recyclable(units, self.name)
        copies, total, device = units.copies, units.total, units.device
        self._tops = torch.tensor(_tops(self.maximum), device=device)  # longest silence of each bin
        lengths = torch.arange(self.maximum + 1, device=device)
        self._places = torch.bucketize(lengths, self._tops)  # a table: searching costs more
        true = torch.ones(copies, total, dtype=torch.bool, device=device)
        self._others = [true[:, span] for span in units.spans]  # sites left out always fire
        silent = torch.zeros(copies, total, dtype=torch.int64, device=device)
        self.register_buffer("silent", silent)
        self.register_buffer("tau", torch.full_like(silent, self.initial))
        shape = (copies, total, len(self._tops))
        self.register_buffer("silences", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("replaced", silent.new_zeros(copies))

    def _restarted(self, copies: Tensor) -> None:
        dormancy.forget(self.silent, copies)
        self.tau.copy_(torch.where(copies.unsqueeze(-1), self.initial, self.tau))
        self.silences.mul_(~copies.view(-1, 1, 1))

    def after_step(self) -> None:
        if self.percentile == 1:
            return
        self._listen()
        due = None if self._too_early() else self.clock.due(self.check)
        if due is not None:
            self._reset(due)
        due = self.clock.due(self.every)
        if due is not None:
            self._adapt(due)

    def _listen(self) -> None:
        """Who fired in this minibatch? Silences that ended are counted."""
        parts = list(self._others)
        for position, site, _ in self._sites:
            parts[position] = site.activation.amax(1) > 0
        fired = torch.cat(parts, -1)
        ended = fired & (self.silent > 0)
        if self.clock.mask is not None:
            ended = ended & self.clock.mask.unsqueeze(-1)
        self._log(ended)
        silent = (self.silent + 1) * ~fired
        self.silent.copy_(self.clock.keep(silent, self.silent))

    def _log(self, ended: Tensor) -> None:
        """Count the present silence of the units that `ended` `[S, total]` names."""
        place = self._bin(self.silent).unsqueeze(-1)
        counts = self.silences.gather(-1, place) + ended.unsqueeze(-1).to(torch.int32)
        self.silences.scatter_(-1, place, counts)

    def _bin(self, steps: Tensor) -> Tensor:
        return self._places.take(steps.clamp(max=self.maximum))

    def _too_early(self) -> bool:
        """Before tau first changes no unit is due earlier than its initial value."""
        known, first = self.clock.known, min(self.initial, self.every)
        return known is not None and all(known[copy] < first for copy in self.clock.current())

    def _reset(self, due: Tensor) -> None:
        overdue = (self.silent >= self.tau) & due.unsqueeze(-1)
        self._log(overdue)
        selections = [
            Selection.from_mask(position, site, overdue[:, span])
            for position, site, span in self._sites
        ]
        self._recycle(selections, treatment=self.treatment)
        self.silent.mul_(~overdue)

    def _adapt(self, due: Tensor) -> None:
        """Tau from the silences since the last time."""
        total = self.silences.sum(-1)  # [S, total]
        upto = self.silences.cumsum(-1).double()
        least = self.percentile * total.double() - _ROUNDING
        place = (upto < least.unsqueeze(-1)).sum(-1)  # bin of the percentile
        shorter = place < self._bin(self.tau)
        enough = total.double() * (1 - self.percentile) >= 1 - _ROUNDING
        tau = torch.where(shorter & enough, self._tops[place], self.tau)
        tau = torch.where(~shorter & (total > 0), 2 * self.tau, tau)
        tau = tau.clamp(self.minimum, self.maximum)
        due = due.unsqueeze(-1)
        self.tau.copy_(torch.where(due, tau, self.tau))
        self.silences.mul_(~due.unsqueeze(-1))


def _tops(maximum: int) -> list[int]:
    """Longest silence of each bin: 1, 2, ..., 16, then eight bins per octave, up to `maximum`."""
    tops = list(range(1, min(_EXACT, maximum) + 1))
    while tops[-1] < maximum:
        tops.append(min(maximum, round(_EXACT * 2 ** ((len(tops) - _EXACT + 1) / _PER_OCTAVE))))
    return tops
