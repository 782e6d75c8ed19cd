"""The optimizer's state of recycled units: cleared, and then stepped as if the unit were newborn.

Adam corrects the bias of its averages by the step count T of the whole tensor. A unit whose
averages were just cleared would take a first step of 3.16 learning rates (betas 0.9, 0.999). Exact
recycling needs a step count t per element. The averages themselves are right: from zero, the stock
recursions give what they give a newborn. Only the size of the step is wrong, so it is corrected
after the optimizer's step, with a copy of the weights from before:

    p <- p_before + F (p - p_before)     F = f(t) / f(T)     f(t) = sqrt(1 - b2^t) / (1 - b1^t)

`p_before` includes decoupled weight decay. F = 1 for elements as old as their tensor. An element
belongs to two units, its row's and its column's; the younger counts. On the CPU one compiled loop
does it (kernels.py), and `BatchedAdam` scales its own steps, without any copy. Elsewhere whole
tensors are chosen from: f may fall and then rise with t, so it is kept as a falling plus a rising
part, for the younger has the larger of the one and the smaller of the other.

Once f(T) = 1 this is Adam with a step count per element,
`p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)`, as in `lop/utils/AdamGnT.py` of Dohare et
al. 2024. Deviation from a newborn tensor under torch: eps is not bias-corrected by t (torch adds
eps sqrt(1 - b2^t) at that place); it matters for weights with sqrt(v) near eps or below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity import kernels
from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.aging import Aging
from perennial.plasticity.clock import Clock
from perennial.plasticity.pace import Pace
from perennial.plasticity.parts import Part, Sides, affine, parts_of
from perennial.plasticity.surgery import Selection, silence_columns, silence_rows
from perennial.plasticity.units import Units

TREATMENTS = ("exact", "zero", "keep")
_NEVER = -(2**40)  # birth of units as old as their tensor


class Moments:
    """The state that one optimizer keeps about units: `recycled` clears it, `before_step` and
    `after_step` enclose the optimizer's step and give young units the step of newborn ones.

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
        device, copies = units.device, clock.copies
        # When each unit was recycled, in updates; the last entry stands for features without unit.
        self.birth = torch.full((copies, units.total + 1), _NEVER, device=device)
        self.paces: dict[tuple[float, float], Pace] = {}
        for part in self.parts if self.adam else ():
            part.group = self.group_of[part.parameter]
            beta1, beta2 = groups[part.group]["betas"]
            part.betas = (float(beta1), float(beta2))
            if part.betas not in self.paces:
                self.paces[part.betas] = Pace(part.betas, units.dtype, device)
        self.horizon = max((pace.horizon for pace in self.paces.values()), default=0)
        self._held: list[tuple[Part, Tensor]] = []  # weights before the step
        self._stale = False  # the host's copies miss what was compiled or captured
        self._ever = False  # a unit was recycled
        self.host_birth = [_NEVER] * copies  # of the youngest unit, or later
        # On the CPU births are read where they lie, after each event.
        self._seen = self.birth.numpy() if device.type == "cpu" else None
        self._changed = False  # births may have changed since then
        self._aging: Aging | None = None
        if self.paces and kernels.ready(*(part.parameter for part in self.parts)):
            tables = {betas: pace.table[0].contiguous() for betas, pace in self.paces.items()}
            # Our Adam steps by the ages after its step; others are corrected when that is counted.
            ahead = 1 if isinstance(optimizer, BatchedAdam) else 0
            self._aging = Aging(self.parts, tables, self.birth, clock.updates, ahead)

    def tensors(self) -> dict[str, Tensor]:
        """State for checkpoints, the copies axis first."""
        return {"birth": self.birth}

    def reload(self) -> None:
        """Host copies after loading."""
        self.host_birth = self.birth.amax(-1).tolist()
        self._stale = False
        self._ever = False
        if any(birth > _NEVER for birth in self.host_birth):
            self._age()

    def restart(self, copies: Tensor | None = None) -> None:
        """All state of these copies (bool `[S]`; None: of all) was reset, T = 0: all units are as
        old as their tensors again. Where some tensors were reset alone nothing need be said: a unit
        is never older than its tensor, and in the others it keeps its age."""
        if copies is None:
            self.birth.fill_(_NEVER)
        else:
            self.birth.masked_fill_(copies.unsqueeze(-1), _NEVER)
        self._changed = True

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
        if treatment == "exact" and self.paces:
            self._age()
            birth = self.birth[:, self.units.spans[selection.position]]
            now = self.clock.updates.unsqueeze(-1)
            birth.copy_(torch.where(selection.gone > 0, now, birth))
            if self.clock.known is None:
                self._stale = True
            else:
                for copy in self.clock.current():
                    self.host_birth[copy] = self.clock.known[copy]

    def _averages(self, parameter: Tensor | None) -> list[Tensor]:
        """State tensors with one entry per weight; none before the first step."""
        if parameter is None or parameter not in self.group_of:
            return []
        values = self.optimizer.state.get(parameter, {}).values()
        return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape]

    def _age(self) -> None:
        """A unit was recycled."""
        self._ever = self._changed = True
        optimizer = self.optimizer
        if isinstance(optimizer, BatchedAdam) and not torch.compiler.is_compiling():
            optimizer.aging = optimizer.aging or self._aging

    @property
    def awake(self) -> bool:
        """Whether a unit may be young, as far as the host knows, and the optimizer does not step by
        age itself."""
        if not self._ever:
            return self.clock.known is None
        optimizer = self.optimizer
        return not (
            isinstance(optimizer, BatchedAdam)
            and optimizer.aging is not None
            and optimizer.aging is self._aging
            and optimizer.compiled
        )

    def close(self) -> None:
        """The optimizer steps by age no longer."""
        if isinstance(self.optimizer, BatchedAdam) and self.optimizer.aging is self._aging:
            self.optimizer.aging = None

    @property
    def holding(self) -> bool:
        """Whether `after_step` has something to do."""
        return bool(self._held)

    # ---- around every step ---------------------------------------------------------------------

    def before_step(self) -> None:
        """Hold the weights while a unit is young; directly before the optimizer's step."""
        self._held = []
        known = self.clock.known
        if self._stale and known is not None:
            self.reload()
        if not self.paces or not self.awake:
            return
        self.close()
        if known is None:
            self._stale = True
        else:
            if self._changed and self._seen is not None:
                self.host_birth = self._seen.max(1).tolist()
            self._changed = False
            if all(known[c] + 1 - self.host_birth[c] >= self.horizon for c in self.clock.current()):
                return  # nobody is young
        scales = [_scale(group) for group in self.optimizer.param_groups]
        for part in self.parts:
            if part.parameter.grad is not None:
                self._held.append((part, self._hold(part, scales[part.group])))

    def _hold(self, part: Part, scale: float | Tensor | None) -> Tensor:
        """The weights as the step of the averages will find them."""
        parameter, memory = part.parameter, part.before
        if torch.compiler.is_compiling():
            return parameter.clone() if scale is None else parameter * scale
        if memory is None:
            memory = part.before = torch.empty_like(parameter, requires_grad=False)
        if scale is None:
            return memory.copy_(parameter)
        return torch.mul(parameter, scale, out=memory)

    def after_step(self) -> None:
        """Give every element the step of its own age; directly after the optimizer's step, which
        the clock has counted. Copies that stood still did not move and stay."""
        held, self._held = self._held, []
        if not held:
            return
        ours = isinstance(self.optimizer, BatchedAdam)
        if self._aging is not None and not ours and not torch.compiler.is_compiling():
            touched = [tensor for part, before in held for tensor in (part.parameter, before)]
            if kernels.ready(*touched):
                self._scale_by_age(held, self._aging)
                return
        # A clock that was set back leaves births ahead of it: those units are newborn.
        ages = (self.clock.updates.unsqueeze(-1) - self.birth).clamp_(min=1)
        for betas, pace in self.paces.items():
            mine = [pair for pair in held if pair[0].betas == betas]
            if not mine:
                continue
            steps = torch.stack([self._steps(part) for part, _ in mine]).to(ages.device)
            for (part, before), vectors in zip(mine, pace.factors(ages, steps), strict=True):
                self._correct(part, before, pace, part.sides(vectors))

    def _steps(self, part: Part) -> Tensor:
        """T of a parameter, `[S or 1]`."""
        state = self.optimizer.state.get(part.parameter, {})
        return torch.as_tensor(state.get("step", 0)).view(-1)

    def _scale_by_age(self, held: list[tuple[Part, Tensor]], aging: Aging) -> None:
        aging.look_up()
        for part, before in held:
            ages = aging.of(part.parameter)
            assert ages is not None
            lead = self.birth.shape[0] if part.batched else 1
            weight, old = (
                kernels.array(t).reshape(lead, ages.rows, ages.width)
                for t in (part.parameter, before)
            )
            steps = kernels.array(self._steps(part).expand(lead).contiguous())
            kernels.scale_by_age(weight, old, steps, ages.first, ages.columns, *ages.known)

    def _correct(self, part: Part, before: Tensor, pace: Pace, sides: Sides) -> None:
        parameter = part.parameter
        row, column = sides[0]
        if row is None or column is None:
            factor = column if row is None else row
            assert factor is not None
        elif not pace.rises:
            factor = torch.maximum(row, column)
        elif not pace.falls:
            factor = torch.minimum(row, column)
        else:
            (_, _), (row, column), (more_row, more_column) = sides
            assert row is not None and column is not None
            assert more_row is not None and more_column is not None
            factor = torch.maximum(row, column).add_(torch.minimum(more_row, more_column))
        if torch.compiler.is_compiling():
            parameter.copy_(torch.lerp(before, parameter, factor))
        else:
            torch.lerp(before, parameter, factor, out=parameter)


def _scale(group: dict[str, Any]) -> float | Tensor | None:
    """What decoupled weight decay multiplies the weights by; None without."""
    if not group["weight_decay"] or not group.get("decoupled_weight_decay", False):
        return None
    return 1 - group["lr"] * group["weight_decay"]
