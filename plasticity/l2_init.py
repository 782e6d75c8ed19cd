"""Pulls towards the weights that the network started with."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity import kernels
from perennial.plasticity.base import FRESH, Intervention, Stage
from perennial.plasticity.flat import SideBySide, flatten
from perennial.plasticity.registry import check, default
from perennial.plasticity.regularize import in_scope
from perennial.plasticity.surgery import fresh_rows
from perennial.plasticity.units import Layer, Units


class L2Init(Intervention):
    """Kumar, Marklund & Van Roy, Maintaining plasticity in continual learning via regenerative
    regularization, CoLLAs 2024 (arXiv 2308.11958).

    With d = w - w0 and w0 the weights at `attach`, this joins the gradient:

        l2            strength * d                   of strength/2 |d|^2
        l1            strength * sign(d)             of strength |d|_1
        norm          strength * d / |d|, 0 at d = 0; |d| over all tensors together, not squared
                      (Juliani & Ash 2024; Plasticine)
        wasserstein   as l2, with each tensor's w0 permuted into the order of its w: only the
                      distribution of the initial weights is kept (Lewandowski, Tanaka, Schuurmans &
                      Machado 2023, arXiv 2312.00246)

    Args:
        strength: gradient per unit of d. The paper's loss has no 1/2: its lambda is strength / 2.
        distance: which of the above.
        scope: "layers": weights and biases of linear and convolutional layers (norms are left out,
            as in the authors' code); "weights": matrices and kernels; "all" parameters.
        decoupled: move the weights by learning rate * pull before the step instead of adding to the
            gradient, as decoupled weight decay does. The default is coupled, as published.
        average: divide each tensor's pull by its number of entries (Chung et al. 2024).
        resample: w0 is a fresh draw of every layer's initial distribution at each step (an option
            of the authors' code; costs much).
        every: steps of the optimizer between sorts of the wasserstein distance. Between them the
            order stands; 1 is exact and slow.

    Deviations: the unsquared norm is guarded at the start, where published code divides by zero. A
    recycled unit is pulled to what it was at `attach`, not to its fresh draw.
    """

    name: ClassVar[str] = "l2-init"
    stage: ClassVar[Stage] = Stage.DECAY

    def __init__(
        self,
        strength: float = default("l2-init", "strength"),
        distance: str = default("l2-init", "distance"),
        scope: str = default("l2-init", "scope"),
        decoupled: bool = default("l2-init", "decoupled"),
        average: bool = default("l2-init", "average"),
        resample: bool = default("l2-init", "resample"),
        every: int = default("l2-init", "every"),
    ) -> None:
        super().__init__()
        given = {"strength": strength, "distance": distance, "scope": scope, "every": every}
        given |= {"decoupled": decoupled, "average": average, "resample": resample}
        check(self.name, given)
        if distance == "wasserstein" and resample:
            raise ValueError("l2-init: distance=wasserstein and resample=true clash; leave one out")
        if distance == "norm" and average:
            raise ValueError("l2-init: distance=norm and average=true clash; leave one out")
        self.strength, self.distance, self.scope = strength, distance, scope
        self.decoupled, self.average = decoupled, average
        self.resample, self.every = resample, every

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [
            (place, p)
            for place, group in enumerate(in_scope(units, optimizer, self.scope))
            for p in group
        ]
        self._batched = units.batched
        for number, (_, p) in enumerate(self._groups):
            origin = p.detach().clone(memory_format=torch.contiguous_format)
            self.register_buffer(f"origin_{number}", origin if self._batched else origin[None])
        self._flat = SideBySide()
        self._loaded()

    def _loaded(self) -> None:
        buffers = [self.get_buffer(f"origin_{number}") for number in range(len(self._groups))]
        # As the parameters see them; one sorted row per copy for the wasserstein distance.
        if self._batched:
            flatten(buffers)
        self._origins = [b if self._batched else b[0] for b in buffers]
        sorts = self.distance == "wasserstein"
        self._sorted = [b.flatten(1).sort(-1).values for b in buffers] if sorts else []

    def before_step(self) -> None:
        if self.strength == 0:
            return
        if self.resample:
            self._draw()
        elif self.distance == "wasserstein":
            self._match()
        chosen = [
            (p, p.grad, origin, place)
            for (place, p), origin in zip(self._groups, self._origins, strict=True)
            if p.grad is not None
        ]
        if not chosen:
            return
        weights: list[Tensor] = [p for p, _, _, _ in chosen]
        grads = [grad for _, grad, _, _ in chosen]
        origins = [origin for _, _, origin, _ in chosen]
        if self.distance == "l2" and not self.average and not self.decoupled:
            # Elsewhere gradients are new tensors at every step.
            spans = self._flat.spans(grads, weights, origins) if self._batched else None
            if spans and all(kernels.ready(*run) for run in spans):
                for run in spans:
                    grad, weight, origin = map(kernels.array, run)
                    kernels.pull(grad, weight, origin, self.strength)
                return
        pulls = self._pulls(weights, origins)
        if self.decoupled:
            self._move(weights, pulls, [place for _, _, _, place in chosen])
        else:
            torch._foreach_add_(grads, pulls, alpha=self.strength)

    def _move(self, weights: list[Tensor], pulls: list[Tensor], places: list[int]) -> None:
        """Move weights against the pulls by their group's learning rate."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if self.clock.mask is None and not any(isinstance(rate, Tensor) for rate in rates):
            for place, rate in enumerate(rates):
                here = [k for k, other in enumerate(places) if other == place]
                if here:
                    moved, by = [weights[k] for k in here], [pulls[k] for k in here]
                    torch._foreach_add_(moved, by, alpha=-rate * self.strength)
            return
        for weight, pull, place in zip(weights, pulls, places, strict=True):
            moved_to = weight - rates[place] * self.strength * pull
            weight.copy_(self.clock.keep(moved_to, weight))

    def _pulls(self, weights: list[Tensor], origins: list[Tensor]) -> list[Tensor]:
        """What the strength multiplies: the distance's gradient."""
        pulls = list(torch._foreach_sub(weights, origins))
        if self.distance == "l1":
            torch._foreach_sign_(pulls)
        elif self.distance == "norm":
            rows = [p if self._batched else p.unsqueeze(0) for p in pulls]
            squares = torch.stack([row.flatten(1).square().sum(-1) for row in rows]).sum(0)
            length = squares.sqrt()
            scale = torch.where(length > 0, 1 / torch.where(length > 0, length, 1.0), 0.0)
            for row in rows:
                row.mul_(scale.view(-1, *[1] * (row.ndim - 1)))
        if self.average:
            for pull in pulls:
                pull.mul_((pull.shape[0] if self._batched else 1) / pull.numel())
        return pulls

    def _match(self) -> None:
        """Each tensor's initial weights in the order of its weights now: rank by rank."""
        due = self.clock.due(self.every)
        if due is None:
            return
        for (_, p), origin, values in zip(self._groups, self._origins, self._sorted, strict=True):
            weight = (p if self._batched else p.unsqueeze(0)).flatten(1)
            rows = origin.view(weight.shape)
            matched = torch.empty_like(rows).scatter_(1, weight.argsort(-1), values)
            rows.copy_(torch.where(due.unsqueeze(-1), matched, rows))

    def _draw(self) -> None:
        """Fresh draws of the initial distributions; what has none keeps its first value."""
        layers = {
            id(parameter): (position, layer, parameter is layer.module.weight)
            for position, layer in enumerate(self.units.layers)
            for parameter in layer.module.parameters(recurse=False)
        }
        for (_, p), origin in zip(self._groups, self._origins, strict=True):
            if id(p) not in layers:
                continue
            position, layer, is_weight = layers[id(p)]
            fresh = self._fresh(position, layer, is_weight).view_as(origin)
            origin.copy_(self.clock.keep(fresh, origin))

    def _fresh(self, position: int, layer: Layer, is_weight: bool) -> Tensor:
        n_out = layer.weight.shape[1]
        if is_weight:
            return fresh_rows(layer, layer.init, self._stream(FRESH, position + 1, 1), n_out)
        bound = layer.init.bias_bound(layer.fan_in)
        draw = self._stream(FRESH, position + 1, 2).uniform(n_out)
        return ((2 * draw - 1) * bound).to(layer.weight.dtype)
