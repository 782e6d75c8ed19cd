"""The optimizer's state of recycled units: cleared, and then stepped as if the unit were newborn.

Adam corrects the bias of its averages by the step count T of the whole tensor. A unit whose
averages were just cleared would take a first step of 3.16 learning rates (betas 0.9, 0.999). Exact
recycling needs a step count t per element. The averages themselves are right: from zero, the stock
recursions give what they give a newborn. Only the size of the step is wrong, so it is corrected
after the optimizer's step, with a copy of the weights from before:

    p <- p_before + F (p - p_before)     F = f(t) / f(T)     f(t) = sqrt(1 - b2^t) / (1 - b1^t)

`p_before` includes decoupled weight decay. F = 1 for elements as old as their tensor. An element
belongs to two units, its row's and its column's; the younger counts. f may fall and then rise with
t: it is kept as a falling plus a rising part, for the younger has the larger of the one and the
smaller of the other.

In float32 f counts as 1 once it stays within 1e-3 of it (pace.py), and then nothing is done for a
unit any more. On the CPU, while few units are young, only their elements are held and corrected
(few.py), where the parameters share one memory, as `BatchedAdam` lays them out; else whole tensors.

Once f(T) = 1 this is Adam with a step count per element,
`p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)`, as in `lop/utils/AdamGnT.py` of Dohare et
al. 2024. Deviation from a newborn tensor under torch: eps is not bias-corrected by t (torch adds
eps sqrt(1 - b2^t) at that place); it matters for weights with sqrt(v) near eps or below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.clock import Clock
from perennial.plasticity.few import Few
from perennial.plasticity.flat import together
from perennial.plasticity.pace import Pace
from perennial.plasticity.parts import Part, Side, Sides, affine, parts_of
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
        # T is at least updates + offset.
        self.offset = torch.zeros(copies, dtype=torch.int64, device=device)
        self.paces: dict[tuple[float, float], Pace] = {}
        for part in self.parts if self.adam else ():
            part.group = self.group_of[part.parameter]
            beta1, beta2 = groups[part.group]["betas"]
            part.betas = (float(beta1), float(beta2))
            if part.betas not in self.paces:
                self.paces[part.betas] = Pace(part.betas, units.dtype, self.birth)
        self.horizon = max((pace.horizon for pace in self.paces.values()), default=0)
        self._held: list[tuple[Part, Tensor]] = []  # weights before the step
        self._late = False  # f(T) = 1 for all tensors
        # Kept, as parts' `before`: fresh memory every step would cost more than the arithmetic.
        self._factors: dict[tuple[str, torch.Size], Tensor] = {}
        self._stale = False  # the host's copies miss what was compiled or captured
        self._ever = False  # a unit was recycled
        self.offset.add_(self._known_steps())
        self.host_offset = self.offset.tolist()
        self.host_birth = [_NEVER] * copies  # of the youngest unit, or later
        # On the CPU births are read where they lie, after each event: who is young, and where.
        on_cpu = device.type == "cpu"
        self._seen = self.birth.numpy() if on_cpu else None
        self._features = [part.features() for part in self.parts] if on_cpu else []
        self._known = None if self._seen is None else self._seen.copy()  # when last looked at
        self._changed = False  # births may have changed since then
        self._few: Few | None = None
        self._sparse = False  # this step corrects a few elements, not whole tensors

    def _known_steps(self) -> int:
        """The fewest steps of any parameter's state now: read once, at attach."""
        counts = []
        for part in self.parts:
            step = self.optimizer.state.get(part.parameter, {}).get("step", 0)
            counts.append(int(torch.as_tensor(step).min()))
        return min(counts, default=0)

    def tensors(self) -> dict[str, Tensor]:
        """State for checkpoints, the copies axis first."""
        return {"offset": self.offset, "birth": self.birth}

    def reload(self) -> None:
        """Host copies after loading."""
        self.host_offset, self.host_birth = self.offset.tolist(), self.birth.amax(-1).tolist()
        self._stale, self._changed = False, True
        self._ever = any(birth > _NEVER for birth in self.host_birth)
        if self._few is not None:
            self._few.forget()

    def _look(self) -> None:
        """Who is young, read off the births: a function of them alone, so that a resumed run goes
        the same way."""
        self._changed = False
        if self._seen is None or self._known is None:
            return
        latest = self._seen.max(1)
        self.host_birth = latest.tolist()
        if (self._seen == self._known).all():
            return  # the event recycled nobody
        self._known[:] = self._seen
        if self._few is None or not self._few.current():
            self._few = self._lists()
        if self._few is not None:
            young = (self._seen > _NEVER) & (self._seen > latest[:, None] - self.horizon)
            copies, places = young.nonzero()
            born = self._seen[young].tolist()
            self._few.choose(copies.tolist(), places.tolist(), born, self.birth)

    def _lists(self) -> Few | None:
        """Only where all parameters stand side by side and share one pair of betas."""
        parameters = list(self.group_of)
        memory = together(parameters) if len(self.paces) == 1 else None
        if memory is None or any(_scale(group) for group in self.optimizer.param_groups):
            return None
        (pace,) = self.paces.values()
        return Few(memory, self.parts, self._features, self.birth.shape[1], pace)

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
            self.birth.masked_fill_(copies.unsqueeze(-1), _NEVER)
            self._changed = True
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
        if treatment == "exact" and self.paces:
            self._ever = self._changed = True
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

    @property
    def awake(self) -> bool:
        """Whether a unit may be young, as far as the host knows."""
        return self._ever or self.clock.known is None

    # ---- around every step ---------------------------------------------------------------------

    def before_step(self) -> None:
        """Hold the weights while a unit is young; directly before the optimizer's step."""
        self._held, self._sparse = [], False
        if not self.paces:
            return
        known, self._late = self.clock.known, False
        if known is None:
            self._stale = True
        else:
            if self._stale:
                self.reload()
            if self._changed:
                self._look()
            moving = self.clock.current()
            if all(known[c] + 1 - self.host_birth[c] >= self.horizon for c in moving):
                return  # nobody is young
            self._late = all(known[c] + 1 + self.host_offset[c] >= self.horizon for c in moving)
            few = self._few
            if self._late and few is not None and few.active and few.current():
                self._sparse = True
                few.hold()
                return
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
        if self._sparse and self._few is not None:
            self._few.correct(self.clock.host or ())
            return
        if not held:
            return
        # A clock that was set back leaves births ahead of it: those units are newborn.
        ages = (self.clock.updates.unsqueeze(-1) - self.birth).clamp_(min=1)
        for betas, pace in self.paces.items():
            mine = [pair for pair in held if pair[0].betas == betas]
            if not mine:
                continue
            if self._late:
                vectors, risen = pace.settled(ages), self._past(pace.turn)
                for part, before in mine:
                    self._correct(part, before, pace, part.kept_sides(vectors), risen)
                continue
            states = [self.optimizer.state.get(part.parameter, {}) for part, _ in mine]
            steps = torch.stack([torch.as_tensor(state.get("step", 0)) for state in states])
            each = pace.general(ages, steps.to(ages.device).view(len(steps), -1))
            for (part, before), vectors in zip(mine, each, strict=True):
                self._correct(part, before, pace, part.sides(vectors))

    def _past(self, age: int) -> bool:
        """Whether every unit that moves is known to have this age."""
        known = self.clock.known
        if known is None or self._seen is None:
            return False
        return all(known[c] - self.host_birth[c] >= age for c in self.clock.current())

    def _correct(
        self, part: Part, before: Tensor, pace: Pace, sides: Sides, risen: bool = False
    ) -> None:
        """risen: at all present ages f does not fall any more."""
        parameter = part.parameter
        row, column = sides[0]
        if row is None or column is None:
            factor = column if row is None else row
            assert factor is not None
        elif not pace.rises:
            factor = self._younger(torch.maximum, "falling", sides[0], parameter)
        elif risen or not pace.falls:
            factor = self._younger(torch.minimum, "rising", sides[0], parameter)
        else:
            factor = self._younger(torch.maximum, "falling", sides[1], parameter)
            factor.add_(self._younger(torch.minimum, "rising", sides[2], parameter))
        if torch.compiler.is_compiling():
            parameter.copy_(torch.lerp(before, parameter, factor))
        else:
            torch.lerp(before, parameter, factor, out=parameter)

    def _younger(
        self, choose: Callable[..., Tensor], name: str, sides: Side, parameter: Tensor
    ) -> Tensor:
        """What belongs to the younger of the row's and the column's unit."""
        row, column = sides
        if torch.compiler.is_compiling():
            return choose(row, column)
        key = name, parameter.shape
        memory = self._factors.get(key)
        if memory is None:
            memory = self._factors[key] = choose(row, column)
        return choose(row, column, out=memory)


def _scale(group: dict[str, Any]) -> float | Tensor | None:
    """What decoupled weight decay multiplies the weights by; None without."""
    if not group["weight_decay"] or not group.get("decoupled_weight_decay", False):
        return None
    return 1 - group["lr"] * group["weight_decay"]
