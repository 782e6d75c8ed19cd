"""The optimizer's state of recycled units: cleared, and then stepped as if the unit were newborn.

Adam corrects the bias of its averages by the step count T of the whole tensor. A unit whose
averages were just cleared would take a first step of 3.16 learning rates (betas 0.9, 0.999). Exact
recycling needs a step count t per element. Stock optimizers have none, so the averages of young
units are adjusted before the step, with the final gradient g, such that the stock step with T does
what a step with t would do. With Q = b^T, q = b^t:

    average <- A average + B g
    A = (1 - Q) / (1 - Q/b) * (1 - q/b) / (1 - q)        B = (1 - b)/b * (q - Q) / (1 - q)

(the second average takes g^2). A = 1 - B once Q has vanished; B = 0 for a unit as old as its
tensor. An element belongs to two units, its row's and its column's; the younger counts: the larger
B, the smaller A. Derived here; equal to Adam with a step count per element in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.clock import Clock
from perennial.plasticity.surgery import Selection, silence_columns, silence_rows
from perennial.plasticity.units import Site, Units

TREATMENTS = ("exact", "zero", "keep")


@dataclass(eq=False)
class _Part:
    """One parameter with rows or columns of units.

    rows: place of the row units in the vector over all sites; None where rows are no units.
    columns: the same for its input features: a slice where they are all units of one site in order,
        else an index per feature (units.total where a feature is no unit).
    """

    parameter: Tensor
    batched: bool
    rows: slice | None
    columns: slice | Tensor | None
    square: Tensor | None = None
    buffers: dict[int, Tensor] = field(default_factory=dict)
    fixed: dict[int, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    def _sides(self, vector: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rows' and the columns' share of a vector over all units, as they broadcast."""
        ndim = self.parameter.ndim + (0 if self.batched else 1)
        row = column = None
        if self.rows is not None:
            row = vector[:, self.rows]
            row = row.view(*row.shape, *[1] * (ndim - 2))
        if self.columns is not None:
            column = vector[:, self.columns]
            column = column.view(len(column), 1, -1, *[1] * (ndim - 3))
        if not self.batched:
            row, column = (side if side is None else side[0] for side in (row, column))
        return row, column

    def largest(self, place: int, vector: Tensor) -> Tensor:
        """Like `spread`, of a vector that keeps its memory: views and result are made once."""
        if place not in self.fixed or isinstance(self.columns, Tensor):
            self.fixed[place] = self._sides(vector)
        row, column = self.fixed[place]
        if row is None or column is None:
            both = row if column is None else column
            assert both is not None
            return both
        if place not in self.buffers:
            self.buffers[place] = torch.maximum(row, column)
            return self.buffers[place]
        return torch.maximum(row, column, out=self.buffers[place])

    def squared(self, grad: Tensor) -> Tensor:
        """g^2 in a buffer of its own: fresh memory every step costs more than the product."""
        if self.square is None or self.square.dtype is not grad.dtype:
            self.square = torch.empty_like(self.parameter, dtype=grad.dtype)
        return torch.mul(grad, grad, out=self.square)

    def spread(self, vector: Tensor, larger: bool) -> Tensor:
        """A vector over all units `[S, total + 1]` as factors that broadcast to the parameter."""
        row, column = self._sides(vector)
        if row is None or column is None:
            both = row if column is None else column
            assert both is not None
            return both
        return torch.maximum(row, column) if larger else torch.minimum(row, column)


class Moments:
    """The state that one optimizer keeps about units: `recycled` clears it, `before_step` adjusts
    it.

    One per handle, shared by its interventions. Nothing is stored in `optimizer.state`.
    """

    def __init__(self, units: Units, optimizer: Optimizer, clock: Clock) -> None:
        self.units, self.optimizer, self.clock = units, optimizer, clock
        groups = optimizer.param_groups
        # Positions, not the groups: loading a state dict replaces the groups.
        self.group_of = {p: place for place, g in enumerate(groups) for p in g["params"]}
        self.parts = [part for part in _parts(units) if part.parameter in self.group_of]
        adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | BatchedAdam)
        self.adam = adam and not any(g.get("amsgrad", False) for g in groups)
        betas = {beta for g in groups for beta in g["betas"]} if self.adam else set()
        self.betas = sorted(beta for beta in betas if beta > 0)  # beta 0 has no memory to correct
        device, copies, total = units.device, clock.copies, units.total
        # b^t per beta, copy and unit; 0 for units as old as their tensor.
        self.saved = torch.zeros(copies, len(self.betas), total, dtype=torch.float64, device=device)
        self.powers = self.saved.transpose(0, 1)
        # T is at least updates + offset; the last update that may have recycled a unit (-1: none).
        self.offset = torch.zeros(copies, dtype=torch.int64, device=device)
        self.event = torch.full((copies,), -1, dtype=torch.int64, device=device)
        self.decays = torch.tensor(self.betas, dtype=torch.float64, device=device).view(-1, 1, 1)
        self.gains = (1 - self.decays) / self.decays
        tolerance = 1e-18 if units.dtype is torch.float64 else 1e-10
        self.tolerance = tolerance
        self.horizon = max((math.log(tolerance) / math.log(b) for b in self.betas), default=0.0)
        self.factors = torch.zeros(
            len(self.betas), copies, total + 1, dtype=units.dtype, device=device
        )
        self.vectors = list(self.factors)
        self._inner = self.factors[..., :-1]
        self._even = self.adam and all(len(set(g["betas"])) == 1 for g in groups)
        self.host_event = [-1] * copies
        self._stale = False  # the host's copies miss what was compiled or captured
        self.offset.add_(self._known_steps())
        self.host_offset = self.offset.tolist()

    def _known_steps(self) -> int:
        """The fewest steps of any parameter's state now: read once, at attach."""
        counts = []
        for part in self.parts:
            step = self.optimizer.state.get(part.parameter, {}).get("step", 0)
            counts.append(int(torch.as_tensor(step).min()))
        return min(counts, default=0)

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        return self.optimizer.param_groups[self.group_of[parameter]]

    def tensors(self) -> dict[str, Tensor]:
        """State for checkpoints, the copies axis first."""
        return {"offset": self.offset, "event": self.event, "powers": self.saved}

    def reload(self) -> None:
        """Host copies after loading."""
        self.host_offset, self.host_event = self.offset.tolist(), self.event.tolist()
        self._stale = False

    def restart(self, copies: Tensor | None = None, *, whole: bool = True) -> None:
        """The optimizer's state was reset (T = 0).

        copies: bool `[S]`; None for all.
        whole: of all tensors, so that all units are as old as their tensors again. False for some
            tensors: the others, and the units in them, keep their age.
        """
        if copies is None:
            copies = torch.ones_like(self.offset, dtype=torch.bool)
        self.offset.copy_(torch.where(copies, -self.clock.updates, self.offset))
        if whole:
            self.powers.masked_fill_(copies.view(1, -1, 1), 0.0)
        self.host_offset = [-(2**62)] * len(self.host_offset)  # T is unknown to the host for now
        self._stale = True

    def recycled(self, selection: Selection, treatment: str = "exact") -> None:
        """Clear what the optimizer remembers about the selected units.

        treatment: "exact" zeroes every average of their incoming, bias and outgoing weights and
            steps them as newborn (Adam and AdamW; others have no step count to correct); "zero"
            only zeroes; "keep" leaves all (the published runs of continual backprop).
        """
        if treatment == "keep":
            return
        site, kept = selection.site, selection.kept
        layer = site.producer
        for parameter in (layer.module.weight, layer.module.bias):
            for value in self._averages(parameter):
                silence_rows(value if layer.batched else value.unsqueeze(0), kept)
        for parameter in _affine(site):
            for value in self._averages(parameter):
                silence_rows(value if value.ndim == 2 else value.unsqueeze(0), kept)
        for consumer in site.consumers:
            reader = consumer.layer
            for value in self._averages(reader.module.weight):
                lead = value if reader.batched else value.unsqueeze(0)
                silence_columns(lead, consumer.columns, kept)
        if treatment == "exact" and self.betas:
            powers = self.powers[:, :, self.units.spans[selection.position]]
            powers.copy_(torch.where(powers > self.tolerance, powers, 0.0))
            powers.mul_(kept).add_(selection.gone)
            self.event.copy_(torch.where(selection.count > 0, self.clock.updates, self.event))
            if self.clock.known is None:
                self._stale = True
            else:
                for copy in self.clock.current():
                    self.host_event[copy] = self.clock.known[copy]

    def _averages(self, parameter: Tensor | None) -> list[Tensor]:
        """State tensors with one entry per weight; none before the first step."""
        if parameter is None or parameter not in self.group_of:
            return []
        values = self.optimizer.state.get(parameter, {}).values()
        return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape]

    @property
    def needed(self) -> bool:
        """Whether steps have to be counted for units that may be recycled."""
        return bool(self.betas and self.parts)

    # ---- before every step ---------------------------------------------------------------------

    def before_step(self) -> None:
        """Adjust the averages of young units; gradients must be final."""
        if not self.needed:
            return
        known = self.clock.known
        if known is None:
            late = quiet = False
            self._stale = True
        else:
            if self._stale:
                self.reload()
            late = min(map(sum, zip(known, self.host_offset, strict=True))) > self.horizon
            quiet = all(
                event < 0 or count - event > self.horizon
                for event, count in zip(self.host_event, known, strict=True)
            )
        if quiet:
            return
        if self.clock.mask is None:
            self.powers.mul_(self.decays)
        else:
            older = self.powers * self.decays
            self.powers.copy_(torch.where(self.clock.mask.view(1, -1, 1), older, self.powers))
        if late:
            self._adjust_late()
        else:
            self._adjust()

    def _present(self) -> list[tuple[_Part, Tensor, dict[str, Tensor]]]:
        """Parts that this step moves, their gradient as the optimizer will see it, their state."""
        found = []
        mask = self.clock.mask
        for part in self.parts:
            p, grad = part.parameter, part.parameter.grad
            state = self.optimizer.state.get(p)
            if grad is None or not state:
                continue
            group = self._group(p)
            if group.get("maximize", False):
                grad = -grad
            if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", False):
                grad = grad.add(p.detach(), alpha=group["weight_decay"])
            if mask is not None and part.batched:  # a standing copy's gradient may be anything
                grad = torch.where(mask.view(-1, *[1] * (grad.ndim - 1)), grad, 0.0)
            found.append((part, grad, state))
        return found

    def _adjust_late(self) -> None:
        """T beyond the horizon: `average.lerp_(g, B)`."""
        factors = self.powers / (1 - self.powers)
        if self.clock.mask is not None:
            factors = factors * self.clock.mask.view(1, -1, 1)
        torch.mul(factors, self.gains, out=self._inner)
        present = self._present()
        if not present:
            return
        if len(self.betas) == 1 and self._even:
            grads = [grad for _, grad, _ in present]
            squares = [part.squared(grad) for part, grad, _ in present]
            weights = [part.largest(0, self.vectors[0]) for part, _, _ in present]
            torch._foreach_lerp_([state["exp_avg"] for *_, state in present], grads, weights)
            torch._foreach_lerp_([state["exp_avg_sq"] for *_, state in present], squares, weights)
            return
        for part, grad, state in present:
            beta1, beta2 = self._group(part.parameter)["betas"]
            if beta1:
                place = self.betas.index(beta1)
                state["exp_avg"].lerp_(grad, part.largest(place, self.vectors[place]))
            if beta2:
                place = self.betas.index(beta2)
                weight = part.largest(place, self.vectors[place])
                state["exp_avg_sq"].lerp_(part.squared(grad), weight)

    def _adjust(self) -> None:
        """Any T: `average <- A average + B g`."""
        for part, grad, state in self._present():
            steps = torch.as_tensor(state["step"]) + 1.0
            for which, key in ((0, "exp_avg"), (1, "exp_avg_sq")):
                beta = self._group(part.parameter)["betas"][which]
                if beta == 0:
                    continue
                factor_a, factor_b = self._coefficients(self.betas.index(beta), steps)
                value = grad if which == 0 else grad * grad
                state[key].mul_(part.spread(factor_a, larger=False))
                state[key].addcmul_(value, part.spread(factor_b, larger=True))

    def _coefficients(self, place: int, steps: Tensor) -> tuple[Tensor, Tensor]:
        """A and B `[S, total + 1]` at T = `steps` (scalar or `[S]`)."""
        b, q = self.betas[place], self.powers[place]
        tensor = (b ** steps.to(q)).view(-1, 1)
        young = (q > 0) & (q > tensor)  # a tensor that was reset alone may be younger than its unit
        if self.clock.mask is not None:
            young = young & self.clock.mask.view(-1, 1)
        first = q >= b  # t = 1: nothing is remembered, whatever T
        factor_a = (1 - tensor) / (1 - tensor / b) * (1 - q / b) / (1 - q)
        factor_a = torch.where(young, torch.where(first, 0.0, factor_a), 1.0)
        factor_b = ((1 - b) / b * (q - tensor) / (1 - q)).clamp_(min=0.0)
        factor_b = torch.where(young, factor_b, 0.0)
        pad = torch.nn.functional.pad
        return (
            pad(factor_a, (0, 1), value=1.0).to(self.factors.dtype),
            pad(factor_b, (0, 1)).to(self.factors.dtype),
        )


def _parts(units: Units) -> list[_Part]:
    """Every parameter that holds rows or columns of units, once."""
    parts: dict[Tensor, _Part] = {}
    feeds: dict[Tensor, list[tuple[Tensor, slice, int, bool]]] = {}
    for site, span in zip(units, units.spans, strict=True):
        layer = site.producer
        for parameter in (layer.module.weight, layer.module.bias):
            if parameter is not None:
                parts[parameter] = _Part(parameter, layer.batched, span, None)
        for parameter in _affine(site):
            parts[parameter] = _Part(parameter, parameter.ndim == 2, span, None)
        for consumer in site.consumers:
            reader = consumer.layer
            entry = (consumer.columns.table, span, reader.weight.shape[2], reader.batched)
            feeds.setdefault(reader.module.weight, []).append(entry)
    for parameter, entries in feeds.items():
        part = parts.setdefault(parameter, _Part(parameter, entries[0][3], None, None))
        part.columns = _columns(entries, units.total)
    return list(parts.values())


def _affine(site: Site) -> list[Tensor]:
    """Gains and offsets of the norms on a site's way, one per unit (`[n]`, batched `[S, n]`)."""
    values = [getattr(norm, name, None) for norm in site.norms for name in ("weight", "bias")]
    return [value for value in values if isinstance(value, Tensor)]


def _columns(entries: Sequence[tuple[Tensor, slice, int, bool]], total: int) -> slice | Tensor:
    """Where each input feature's unit stands in the vector over all sites."""
    table, span, features, _ = entries[0]
    place = torch.full((features,), total, device=table.device)
    for table, span, _, _ in entries:
        units = torch.arange(span.start, span.stop, device=table.device)
        place[table] = units.unsqueeze(-1).expand_as(table)
    if len(entries) == 1 and bool(
        (place == torch.arange(features, device=place.device) + span.start).all()
    ):
        return span
    return place
