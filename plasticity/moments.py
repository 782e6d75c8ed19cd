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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.clock import Clock
from perennial.plasticity.parts import Part, affine, parts_of
from perennial.plasticity.surgery import Selection, silence_columns, silence_rows
from perennial.plasticity.units import Units

TREATMENTS = ("exact", "zero", "keep")


class _Scratch:
    """One piece of memory for all intermediate results: it stays in the cache, and fresh memory
    every step would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}
        self.views: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}

    def of(self, name: str, like: Tensor) -> Tensor:
        key = name, like.shape, like.dtype
        if key not in self.views:
            memory = self.memory.get(name)
            if memory is None or memory.numel() < like.numel() or memory.dtype != like.dtype:
                self.memory[name] = memory = like.new_empty(like.numel())
                self.views.clear()
            self.views[key] = memory[: like.numel()].view(like.shape)
        return self.views[key]


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
        self.parts = [part for part in parts_of(units) if part.parameter in self.group_of]
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
        # Q below this changes no bit worth having; powers below it count as none.
        self.tolerance = 1e-18 if units.dtype is torch.float64 else 1e-8
        self.horizons = [math.log(self.tolerance) / math.log(beta) for beta in self.betas]
        self.factors = torch.zeros(
            len(self.betas), copies, total + 1, dtype=units.dtype, device=device
        )
        self.vectors = list(self.factors)
        self._inner = self.factors[..., :-1]
        self._scratch = _Scratch()
        shape = (len(self.betas), len(self.parts), copies, total + 1)
        self._keep = torch.ones(shape, dtype=units.dtype, device=device)
        self._take = torch.zeros(shape, dtype=units.dtype, device=device)
        for number, part in enumerate(self.parts):
            part.number = number
            if self.adam:
                beta1, beta2 = self._group(part.parameter)["betas"]
                part.places = self._place(beta1), self._place(beta2)
        self.host_event = [-1] * copies
        self._ever = False  # a unit was recycled
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
        self._ever = any(event >= 0 for event in self.host_event)
        self._ever = any(event >= 0 for event in self.host_event)

    def restart(
        self,
        copies: Tensor | None = None,
        *,
        which: Sequence[int] | None = None,
        whole: bool = True,
    ) -> None:
        """The optimizer's state was reset (T = 0).

        copies: bool `[S]`; None for all.
        which: the same as host integers, where the caller knows them.
        whole: of all tensors, so that all units are as old as their tensors again. False for some
            tensors: the others, and the units in them, keep their age.
        """
        if copies is None:
            copies = torch.ones_like(self.offset, dtype=torch.bool)
        self.offset.copy_(torch.where(copies, -self.clock.updates, self.offset))
        if whole:
            self.powers.masked_fill_(copies.view(1, -1, 1), 0.0)
        due, last = self.clock.last_due
        if which is None and copies is due:
            which = last
        if self.clock.known is None or which is None:
            self.host_offset = [-(2**62)] * len(self.host_offset)  # unknown to the host for now
            self._stale = True
        else:
            for copy in which:
                self.host_offset[copy] = -self.clock.known[copy]

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
        for parameter in affine(site):
            for value in self._averages(parameter):
                silence_rows(value if value.ndim == 2 else value.unsqueeze(0), kept)
        for consumer in site.consumers:
            reader = consumer.layer
            for value in self._averages(reader.module.weight):
                lead = value if reader.batched else value.unsqueeze(0)
                silence_columns(lead, consumer.columns, kept)
        if treatment == "exact" and self.betas:
            self._ever = True
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
    def awake(self) -> bool:
        """Whether a unit may be young, as far as the host knows."""
        return self._ever or self.clock.known is None

    # ---- before every step ---------------------------------------------------------------------

    def before_step(self) -> None:
        """Adjust the averages of young units; gradients must be final."""
        if not (self.betas and self.parts):
            return
        known = self.clock.known
        late = [False] * len(self.betas)
        if known is None:
            self._stale = True
        else:
            if self._stale:
                self.reload()
            least = min(map(sum, zip(known, self.host_offset, strict=True)))
            late = [least > horizon for horizon in self.horizons]
            if all(
                event < 0 or count - event > self.horizons[-1]
                for event, count in zip(self.host_event, known, strict=True)
            ):
                return  # nobody is young
        mask = self.clock.mask
        if mask is None:
            self.powers.mul_(self.decays)
        else:
            older = self.powers * self.decays
            self.powers.copy_(torch.where(mask.view(1, -1, 1), older, self.powers))
        self._adjust(late)

    def _adjust(self, late: list[bool]) -> None:
        """`average <- A average + B g`; for betas whose Q has vanished `average.lerp_(g, B)`."""
        if any(late):
            factors = self.powers / (1 - self.powers)
            if self.clock.mask is not None:
                factors = factors * self.clock.mask.view(1, -1, 1)
            torch.mul(factors, self.gains, out=self._inner)
        if not all(late):
            self._coefficients()
        for part, grad, state in self._present():
            weight, last = None, -1
            for place, key in zip(part.places, ("exp_avg", "exp_avg_sq"), strict=True):
                if place < 0:
                    continue
                value = grad if key == "exp_avg" else self._squared(grad)
                if late[place]:
                    if place != last:
                        sides = part.kept_sides("late", place, self.vectors[place])
                        weight, last = self._extreme(torch.maximum, *sides, grad), place
                    assert weight is not None
                    state[key].lerp_(value, weight)
                    continue
                keep = part.kept_sides("keep", place, self._keep[place, part.number])
                state[key].mul_(self._extreme(torch.minimum, *keep, grad))
                take = part.kept_sides("take", place, self._take[place, part.number])
                state[key].addcmul_(value, self._extreme(torch.maximum, *take, grad))

    def _present(self) -> list[tuple[Part, Tensor, dict[str, Tensor]]]:
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

    def _coefficients(self) -> None:
        """A and B at each part's own T, into `_keep` and `_take` `[betas, parts, S, total + 1]`."""
        states = [self.optimizer.state.get(part.parameter, {}) for part in self.parts]
        known = [torch.as_tensor(state["step"]) for state in states if "step" in state]
        if not known:
            return
        blank = torch.zeros_like(known[0])
        steps = torch.stack([torch.as_tensor(state.get("step", blank)) for state in states])
        steps = steps.to(self.powers) + 1
        b, q = self.decays.unsqueeze(-1), self.powers.unsqueeze(1)
        tensor = b ** steps.view(1, len(steps), -1, 1)  # [betas, parts, S or 1, 1]
        # A tensor that was reset alone may be younger than its unit: then T counts.
        young = q > tensor
        if self.clock.mask is not None:
            young = young & self.clock.mask.view(1, 1, -1, 1)
        keep = (1 - tensor) / (1 - tensor / b) * ((1 - q / b) / (1 - q))
        take = (q - tensor) * ((1 - b) / b / (1 - q))
        self._keep[..., :-1].copy_(torch.where(young, keep, 1.0))
        self._take[..., :-1].copy_(torch.where(young, take, 0.0))

    def _place(self, beta: float) -> int:
        return self.betas.index(beta) if beta else -1

    def _extreme(
        self,
        choose: Callable[..., Tensor],
        row: Tensor | None,
        column: Tensor | None,
        like: Tensor,
    ) -> Tensor:
        """The row unit's or the column unit's factor, whichever is younger."""
        if row is None or column is None:
            both = row if column is None else column
            assert both is not None
            return both
        if torch.compiler.is_compiling():
            return choose(row, column)
        if like.ndim > 2 and row.shape[-1] == column.shape[-1] == 1:  # one for a whole kernel
            like = like.flatten(2)[..., :1].view(*like.shape[:2], *row.shape[2:])
        return choose(row, column, out=self._scratch.of("factor", like))

    def _squared(self, grad: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return grad * grad
        return torch.mul(grad, grad, out=self._scratch.of("square", grad))
