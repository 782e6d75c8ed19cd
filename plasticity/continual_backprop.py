"""Continual backprop: every step, a few of the least useful mature units start anew."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity import draws
from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.registry import check, default
from perennial.plasticity.surgery import Selection, set_slots
from perennial.plasticity.units import Site, Units

_COIN, _LOT = 1, 3  # streams of this method beside that of fresh weights (base.FRESH)


class ContinualBackprop(Intervention):
    """Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood & Sutton, Loss of plasticity in deep continual
    learning, Nature 632 (2024).

    Per site and step, from the activations h of the minibatch just used and the weights after the
    step: `age += 1`; `mean` and `utility` are running averages (decay eta) of E[h] and of y, with y

        contribution    E|h| * mean |outgoing weight|
        mean-corrected  E|h - mean / (1 - eta^age)| * mean |outgoing weight|
        adaptable       mean-corrected / mean |incoming weight|
        adaptation      1 / mean |incoming weight|
        weight          mean |outgoing weight|
        random          a uniform draw

    Of the units with `age > maturity`, `rate` times their number per step are replaced, those of
    lowest `utility / (1 - eta^age)`: incoming weights drawn anew, outgoing ones zero, the
    consumers' biases take over `mean / (1 - eta^age)`, the optimizer's averages are cleared and
    stepped per unit.

    Args:
        rate: units replaced per eligible unit and step.
        maturity: steps of the optimizer before a unit may be replaced.
        decay: eta.
        utility: which y.
        reference: "exact", or "nature" for the behaviour of the published code, where it differs:
            biases of consumers and Adam's state stay, and expected counts of 1 or more lose their
            fraction.
        count: fractions of a unit are a coin toss per step ("bernoulli") or add up ("accumulate").
        moments: "exact", or "zero" to only zero the optimizer's averages.

    Deviations: over several consumers, outgoing weights are averaged together; a channel that is
    flattened counts as the mean over its columns. Sites with an obstacle (residual streams) are
    left out.
    """

    name: ClassVar[str] = "cbp"
    stage: ClassVar[Stage] = Stage.RECYCLE
    observes: ClassVar[bool] = True

    utility: Tensor
    mean: Tensor
    age: Tensor
    replaced: Tensor
    budget: Tensor

    def __init__(
        self,
        rate: float = default("cbp", "rate"),
        maturity: int = default("cbp", "maturity"),
        decay: float = default("cbp", "decay"),
        utility: str = default("cbp", "utility"),
        reference: str = default("cbp", "reference"),
        count: str = default("cbp", "count"),
        moments: str = default("cbp", "moments"),
    ) -> None:
        super().__init__()
        given = {"rate": rate, "maturity": maturity, "decay": decay, "utility": utility}
        check("cbp", given | {"reference": reference, "count": count, "moments": moments})
        self.rate, self.maturity, self.decay, self.kind = rate, maturity, decay, utility
        self.nature, self.count = reference == "nature", count
        self.treatment = "keep" if self.nature else moments
        self._sites: list[tuple[int, Site, slice]] = []

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._sites = [
            (position, site, span)
            for position, (site, span) in enumerate(zip(units, units.spans, strict=True))
            if not site.obstacle
        ]
        if not self._sites:
            reasons = "; ".join(f"{s.name}: {s.obstacle}" for s in units) or "no hidden layers"
            raise ValueError(f"cbp finds no units to replace ({reasons})")
        copies, total, device = self.clock.copies, units.total, units.device

        def zeros(count: int, dtype: torch.dtype = units.dtype) -> Tensor:
            return torch.zeros(copies, count, dtype=dtype, device=device)

        # Means are per input column of the consumer: the halves of a CReLU differ.
        self._columns = [slice(0, 0)] * len(units)
        end = 0
        for position, site, _ in self._sites:
            self._columns[position] = slice(end, end + site.n * site.columns.k)
            end = self._columns[position].stop
        self.register_buffer("utility", zeros(total))
        self.register_buffer("mean", zeros(end))
        self.register_buffer("age", zeros(total, torch.int64))
        self.register_buffer("replaced", zeros(1, torch.int64)[:, 0])
        if self.count == "accumulate":
            self.register_buffer("budget", zeros(len(units), torch.float64))
        self._worth, self._batch_mean = zeros(total), zeros(end)
        self._loaded()

    def _loaded(self) -> None:
        """The host's own view of the coins: one key per site and copy."""
        self._coins = {
            (position, copy): draws.fold_int(draws.fold_int(key, _COIN), position + 1)
            for position, _, _ in self._sites
            for copy, key in enumerate(self.key.tolist())
        }

    def after_step(self) -> None:
        self._observe()
        selections = [
            self._select(position, site, span)
            for position, site, span in self._sites
            if self._possible(position, site)
        ]
        if not selections:
            return
        means = None if self.nature else [self._mean_of(s.position) for s in selections]
        self._recycle(selections, treatment=self.treatment, means=means)
        for selection in selections:
            span = self.units.spans[selection.position]
            self._forget(selection, span)

    # ---- statistics ----------------------------------------------------------------------------

    def _observe(self) -> None:
        """Advance age, mean and utility by the minibatch just used."""
        mask = self.clock.mask
        self.age.add_(1 if mask is None else mask.unsqueeze(-1))
        for position, site, _ in self._sites:
            columns = self._columns[position]
            torch.mean(
                site.features, 1, out=self._batch_mean[:, columns].unflatten(-1, (site.n, -1))
            )
        self._average(self.mean, self._batch_mean)
        if self.kind != "random":
            for position, site, span in self._sites:
                self._worth[:, span].copy_(self._worth_of(position, site))
            self._average(self.utility, self._worth)

    def _average(self, average: Tensor, new: Tensor) -> None:
        if self.clock.mask is None:
            average.lerp_(new, 1 - self.decay)
        else:
            average.copy_(self.clock.keep(torch.lerp(average, new, 1 - self.decay), average))

    def _worth_of(self, position: int, site: Site) -> Tensor:
        """y of one site's units in the minibatch just used, `[S, n]`."""
        if self.kind == "adaptation":
            return 1 / site.incoming()
        outgoing = site.outgoing()  # [S, n, k]
        if self.kind == "weight":
            return outgoing.mean(-1)
        if self.kind == "contribution":
            if site.nonnegative:
                size = self._batch_mean[:, self._columns[position]].unflatten(-1, (site.n, -1))
            else:
                size = site.features.abs().mean(1)
            return (size * outgoing).mean(-1)
        mean = self._mean_of(position)
        worth = ((site.features - mean.unsqueeze(1)).abs().mean(1) * outgoing).mean(-1)
        return worth / site.incoming() if self.kind == "adaptable" else worth

    def _correction(self, age: Tensor) -> Tensor:
        """1 - eta^age of running averages that began at zero."""
        return 1 - self.decay ** age.clamp(min=1).to(torch.float64)

    def _mean_of(self, position: int) -> Tensor:
        """Bias-corrected mean activation `[S, n, k]` of one site."""
        age = self.age[:, self.units.spans[position]]
        mean = self.mean[:, self._columns[position]].unflatten(-1, (age.shape[-1], -1))
        return (mean / self._correction(age).unsqueeze(-1)).to(mean.dtype)

    # ---- selection -----------------------------------------------------------------------------

    def _slots(self, site: Site) -> int:
        """The most units that one step may replace."""
        return min(site.n, math.floor(self.rate * site.n) + 1)

    def _possible(self, position: int, site: Site) -> bool:
        """False where the host knows that this step replaces nothing: most steps, at usual rates.

        As many units as the site has are at least as many as are eligible, so the coin alone tells.
        """
        if self.rate == 0:
            return False
        known = self.clock.known
        if known is None:
            return True
        mature = [copy for copy in self.clock.current() if known[copy] > self.maturity]
        if self.count == "accumulate" or not mature:
            return bool(mature)
        expected = self.rate * site.n
        if expected >= 1:
            return True
        return any(
            expected
            + draws.to_uniform_int(draws.fold_int(self._coins[position, copy], known[copy]))
            >= 1
            for copy in mature
        )

    def _select(self, position: int, site: Site, span: slice) -> Selection:
        """The lowest utilities among eligible units; how many, by chance or by account."""
        age = self.age[:, span]
        eligible = age > self.maturity
        expected = eligible.sum(-1).double() * self.rate  # [S]
        if self.count == "accumulate":
            budget = self.budget[:, position]
            due = budget + self.clock.keep(expected, torch.zeros_like(expected))
            count = due.floor()
            budget.copy_(due - count)
        else:
            key = draws.fold(draws.fold(self.key, _COIN), position + 1)
            coin = draws.to_uniform(draws.fold(key, self.clock.updates))
            count = (expected + coin).floor()
            if self.nature:
                count = torch.where(expected >= 1, expected.floor(), count)
        score = self._score(position, span, age)
        score = torch.where(eligible, score, torch.inf)
        slots = self._slots(site)
        index = torch.topk(score, slots, dim=-1, largest=False).indices
        chosen = torch.arange(slots, device=age.device) < count.unsqueeze(-1)
        chosen = chosen & eligible.gather(-1, index)
        if self.clock.mask is not None:
            chosen = chosen & self.clock.mask.unsqueeze(-1)
        return Selection(position, site, index, chosen)

    def _score(self, position: int, span: slice, age: Tensor) -> Tensor:
        if self.kind == "random":
            key = draws.fold(draws.fold(self.key, _LOT), position + 1)
            return draws.uniform(draws.fold(key, self.clock.updates), age.shape[-1])
        return self.utility[:, span] / self._correction(age)

    def _forget(self, selection: Selection, span: slice) -> None:
        """New units have no age, utility or mean."""
        index, chosen = selection.index, selection.chosen
        for buffer in (self.age, self.utility):
            set_slots(buffer[:, span], 1, index, chosen, 0)
        mean = self.mean[:, self._columns[selection.position]]
        set_slots(mean.unflatten(-1, (selection.site.n, -1)), 1, index, chosen, 0)
