"""Continual backprop: every step, a few of the least useful mature units start anew."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity import draws, kernels
from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.registry import check, default
from perennial.plasticity.surgery import Selection
from perennial.plasticity.units import Site, Units, product, sum_rows

_WINDOW = 64  # steps of coins that the host looks up at once
_Coins = dict[int, list[tuple[int, float]]]  # step -> place of a site, and its coin
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
        # Both averages in one memory, as is what goes into them: they advance by one operation.
        self._averages, self._recent = zeros(end + total), zeros(end + total)
        self.register_buffer("utility", self._averages[:, end:])
        self.register_buffer("mean", self._averages[:, :end])
        self.register_buffer("age", zeros(total, torch.int64))
        self.register_buffer("replaced", zeros(1, torch.int64)[:, 0])
        if self.count == "accumulate":
            self.register_buffer("budget", zeros(len(units), torch.float64))
        # Work space over all sites, and views of it per site, made once.
        self._batch_mean, self._worth = self._recent[:, :end], self._recent[:, end:]
        self._outgoing = zeros(end)
        flat = end == sum(site.n for _, site, _ in self._sites) == total
        self._means = [self._view(self._batch_mean, p) for p, _, _ in self._sites]
        self._outs = [self._view(self._outgoing, p) for p, _, _ in self._sites]
        rectified = all(site.nonnegative for _, site, _ in self._sites)
        self._plain = self.kind == "contribution" and rectified and flat
        self._ages = self.age.numpy() if device.type == "cpu" else None
        self._shares: dict[tuple[int, ...], Tensor] = {}
        self._in_loops = self._plain and all(
            len(site.consumers) == 1 and site.consumers[0].plain for _, site, _ in self._sites
        )
        self._weights = [site.consumers[0].layer.module.weight for _, site, _ in self._sites]
        # What the loops were laid out for: activations, and where the weights lie.
        self._raws: list[Tensor | None] = [None] * len(self._sites)
        self._places: list[int] = []
        self._loops: list[tuple[Any, ...]] = []
        self._everyone = np.arange(copies)
        # Whether 1 - eta^age is 1 to the last bit for every unit that may be replaced.
        self._settled = self.decay ** (self.maturity + 1) < 2.0**-60
        self._ramp = torch.arange(max(self._slots(s) for _, s, _ in self._sites), device=device)
        self._loaded()

    def _slots(self, site: Site) -> int:
        """At most so many units of a site are replaced in one step."""
        return min(site.n, math.floor(self.rate * site.n) + 1)

    def _view(self, vector: Tensor, position: int) -> Tensor:
        """One site's part of a vector over all input columns: `[S, n, k]`, `[S, n]` where k = 1."""
        site = self.units.sites[position]
        part = vector[:, self._columns[position]]
        return part if site.columns.k == 1 else part.unflatten(-1, (site.n, site.columns.k))

    def _restarted(self, copies: Tensor) -> None:
        names = ("age", "utility", "mean", *(["budget"] if self.count == "accumulate" else []))
        for value in map(self.get_buffer, names):
            value.copy_(torch.where(copies.unsqueeze(-1), 0, value))

    def _loaded(self) -> None:
        """Coins of the coming steps are looked up anew."""
        self._coming: list[tuple[int, int, _Coins]] = [(0, 0, {})] * self.clock.copies

    def after_step(self) -> None:
        self._observe()
        due = self._due()
        if not due:
            return
        selections = [self._select(*self._sites[place]) for place in due]
        means = None
        if not self.nature:
            means = [self._mean_of(s.position, self._settled) for s in selections]
        self._recycle(selections, treatment=self.treatment, means=means)
        for selection in selections:
            self._forget(selection, self.units.spans[selection.position])

    # ---- statistics ----------------------------------------------------------------------------

    def _observe(self) -> None:
        """Advance age, mean and utility by the minibatch just used."""
        if self._in_loops and self._observe_in_loops():
            return
        mask = self.clock.mask
        self.age.add_(1 if mask is None else mask.unsqueeze(-1))
        rows = []
        for (_, site, _), part in zip(self._sites, self._means, strict=True):
            h = site.activation if part.ndim == 2 else site.features
            rows.append(h.shape[1])
            sum_rows(h, part)
        if self._plain:  # E|h| = E[h]
            for (_, site, _), part in zip(self._sites, self._outs, strict=True):
                site.outgoing_sum(out=part)
            product(self._batch_mean, self._outgoing, self._worth)
            self._recent.mul_(self._share(tuple(rows)))
            self._average(self._averages, self._recent)
            return
        for part, count in zip(self._means, rows, strict=True):
            part.mul_(1 / count)
        self._average(self.mean, self._batch_mean)
        if self.kind == "random":
            return
        for position, site, span in self._sites:
            self._worth[:, span].copy_(self._worth_of(position, site))
        self._average(self.utility, self._worth)

    def _observe_in_loops(self) -> bool:
        """The same in compiled loops, where device and memory allow."""
        if torch.compiler.is_compiling():
            return False
        raws = [site.raw for _, site, _ in self._sites]
        places = [w.data_ptr() for w in self._weights]
        if places != self._places or any(a is not b for a, b in zip(raws, self._raws, strict=True)):
            features = [site.activation for _, site, _ in self._sites]
            if not kernels.ready(*features, *self._weights):
                return False
            self._raws, self._places = raws, places
            self._loops = [
                (
                    kernels.array(h),
                    kernels.array(site.consumers[0].layer.weight),
                    kernels.array(self.mean),
                    kernels.array(self.utility),
                    kernels.array(self.age),
                    span.start,
                    1 / site.outgoing_rows,
                    1 - self.decay,
                )
                for (_, site, span), h in zip(self._sites, features, strict=True)
            ]
        mask = self.clock.mask
        copies = self._everyone if mask is None else np.flatnonzero(kernels.array(mask))
        for given in self._loops:
            kernels.advance_contribution(copies, *given)
        return True

    def _share(self, rows: tuple[int, ...]) -> Tensor:
        """What turns sums into means: 1 / rows for E[h], that over weights per column for y."""
        if rows not in self._shares:
            share = torch.ones_like(self._recent)
            mean, worth = share[:, : self.mean.shape[-1]], share[:, self.mean.shape[-1] :]
            for (position, site, span), count in zip(self._sites, rows, strict=True):
                mean[:, self._columns[position]] = 1 / count
                worth[:, span] = 1 / (count * site.outgoing_rows)
            if torch.compiler.is_compiling():
                return share
            self._shares[rows] = share
        return self._shares[rows]

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
            return (site.features.abs().mean(1) * outgoing).mean(-1)
        mean = self._mean_of(position)
        worth = ((site.features - mean.unsqueeze(1)).abs().mean(1) * outgoing).mean(-1)
        return worth / site.incoming() if self.kind == "adaptable" else worth

    def _correction(self, age: Tensor) -> Tensor:
        """1 - eta^age of running averages that began at zero."""
        return 1 - self.decay ** age.clamp(min=1).to(torch.float64)

    def _mean_of(self, position: int, settled: bool = False) -> Tensor:
        """Bias-corrected mean activation `[S, n, k]` of one site; settled: of old units only."""
        age = self.age[:, self.units.spans[position]]
        mean = self.mean[:, self._columns[position]].unflatten(-1, (age.shape[-1], -1))
        if settled:
            return mean
        return (mean / self._correction(age).unsqueeze(-1)).to(mean.dtype)

    # ---- selection -----------------------------------------------------------------------------

    def _due(self) -> list[int]:
        """Places of the sites where this step may replace a unit; mostly none, at usual rates.

        At most as many units are eligible as the site has: the coin alone tells when none is due.
        On the CPU ages are read where they lie, and it is known.
        """
        known = self.clock.known
        if self.rate == 0 or known is None:
            return [] if self.rate == 0 else list(range(len(self._sites)))
        due: set[int] = set()
        for copy in self.clock.current():
            step = known[copy]
            if step <= self.maturity:
                continue
            if self.count == "accumulate":
                return list(range(len(self._sites)))
            first, end, table = self._coming[copy]
            if not first <= step < end:
                table = self._look_ahead(copy, step)
                self._coming[copy] = step, step + _WINDOW, table
            for place, coin in table.get(step, ()):
                if self._ages is not None:
                    eligible = (self._ages[copy, self._sites[place][2]] > self.maturity).sum()
                    if self.rate * float(eligible) + coin < 1:
                        continue
                due.add(place)
        return sorted(due)

    def _look_ahead(self, copy: int, start: int) -> _Coins:
        """Steps of the coming window whose coin may replace units of this copy, and where."""
        table: _Coins = {}
        for place, (position, site, _) in enumerate(self._sites):
            key = draws.fold_int(draws.fold_int(self._keys[copy], _COIN), position + 1)
            expected = self.rate * site.n
            for step in range(start, start + _WINDOW):
                coin = draws.to_uniform_int(draws.fold_int(key, step))
                if expected + coin >= 1:
                    table.setdefault(step, []).append((place, coin))
        return table

    def _select(self, position: int, site: Site, span: slice) -> Selection:
        """The lowest utilities among eligible units; how many, by chance or by account."""
        plain = self._places and self.count == "bernoulli" and not self.nature
        if plain and self._settled and not torch.compiler.is_compiling():
            return self._select_in_loops(position, site, span)
        age = self.age[:, span]
        eligible = age > self.maturity
        expected = eligible.sum(-1).double() * self.rate  # [S]
        if self.count == "accumulate":
            budget = self.budget[:, position]
            due = budget + self.clock.keep(expected, torch.zeros_like(expected))
            count = due.floor()
            budget.copy_(due - count)
        else:
            count = (expected + self._stream(_COIN, position + 1).coin()).floor()
            if self.nature:
                count = torch.where(expected >= 1, expected.floor(), count)
        if self.kind == "random":
            score = self._stream(_LOT, position + 1).uniform(site.n)
        else:
            score = self.utility[:, span]
            if not self._settled:
                score = score / self._correction(age)
        slots = self._slots(site)
        score = torch.where(eligible, score, torch.inf)
        index = torch.topk(score, slots, dim=-1, largest=False).indices
        chosen = self._ramp[:slots] < count.unsqueeze(-1)
        chosen = chosen & eligible.gather(-1, index)
        if self.clock.mask is not None:
            chosen = chosen & self.clock.mask.unsqueeze(-1)
        return Selection(position, site, index, chosen)

    def _select_in_loops(self, position: int, site: Site, span: slice) -> Selection:
        """The same where `_observe_in_loops` serves."""
        coins = kernels.array(self._stream(_COIN, position + 1).coin())
        if self.clock.mask is not None:
            coins = np.where(kernels.array(self.clock.mask), coins, -np.inf)
        shape = len(coins), self._slots(site)
        index, chosen = np.empty(shape, np.int64), np.empty(shape, np.bool_)
        utility, ages = kernels.array(self.utility), kernels.array(self.age)
        kernels.lowest(
            utility, ages, span.start, site.n, self.maturity, self.rate, coins, index, chosen
        )
        return Selection(position, site, torch.from_numpy(index), torch.from_numpy(chosen))

    def _forget(self, selection: Selection, span: slice) -> None:
        """New units have no age, utility or mean."""
        self.age[:, span].mul_(selection.kept.to(torch.int64))
        self.utility[:, span].mul_(selection.kept)
        mean = self.mean[:, self._columns[selection.position]]
        mean.unflatten(-1, (selection.site.n, -1)).mul_(selection.kept.unsqueeze(-1))
