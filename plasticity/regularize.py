"""Pulls on the weights that need nothing but the weights: L2 and decoupled weight decay."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.clock import Clock
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import Units


def in_scope(units: Units, optimizer: Optimizer, scope: str) -> list[list[nn.Parameter]]:
    """The optimizer's parameters that a pull acts on, by parameter group.

    scope: "all"; "layers" for weights and biases of linear and convolutional layers; "weights" for
        parameters with more axes than a bias or a norm's gain has.
    """
    least = 3 if units.batched else 2
    owned = {id(p) for layer in units.layers for p in layer.module.parameters(recurse=False)}
    return [
        [
            p
            for p in group["params"]
            if scope == "all"
            or (scope == "layers" and id(p) in owned)
            or (scope == "weights" and p.ndim >= least)
        ]
        for group in optimizer.param_groups
    ]


def scale_moving(clock: Clock, weights: list[Tensor], factor: float | Tensor) -> None:
    """Multiply weights by a factor, for the copies that the step moves."""
    if clock.mask is None and not isinstance(factor, Tensor):
        torch._foreach_mul_(weights, factor)
        return
    for weight in weights:
        if clock.mask is None:
            weight.mul_(factor)
        else:
            weight.copy_(clock.keep(weight * factor, weight))


class L2(Intervention):
    """Coupled L2: `strength * w` joins the gradient of every parameter w (loss `strength/2 |w|^2`).

    What `weight_decay` of `torch.optim.Adam` does (Loshchilov & Hutter 2019 call it L2
    regularisation). Under Adam it is nearly free of scale: where the task's gradient vanishes,
    weights move by the learning rate whatever the strength.

    Args:
        strength: gradient per weight; 1e-3 in the published slippery-ant runs.
        scope: "all" parameters of the optimizer, biases and log-std too, as published; or
            "weights": those with more axes than a bias has.
    """

    name: ClassVar[str] = "l2"
    stage: ClassVar[Stage] = Stage.DECAY

    def __init__(
        self, strength: float = default("l2", "strength"), scope: str = default("l2", "scope")
    ) -> None:
        super().__init__()
        check("l2", {"strength": strength, "scope": scope})
        self.strength, self.scope = strength, scope
        self._targets: list[nn.Parameter] = []

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._targets = [p for group in in_scope(units, optimizer, self.scope) for p in group]

    def before_step(self) -> None:
        if self.strength == 0:
            return
        pairs = [(p.grad, p.detach()) for p in self._targets if p.grad is not None]
        if pairs:
            grads, weights = [g for g, _ in pairs], [w for _, w in pairs]
            torch._foreach_add_(grads, weights, alpha=self.strength)


class WeightDecay(Intervention):
    """Loshchilov & Hutter, Decoupled weight decay regularization, ICLR 2019 (arXiv 1711.05101).

    Every step `w <- w (1 - learning rate * strength)`, then the optimizer's own step: with Adam
    this is AdamW. The gradient's averages never see it, so that it acts in proportion to the weight
    also under Adam, where coupled L2 does not. Follows a schedule of the learning rate.

    Args:
        strength: share of a weight that goes per step, in learning rates.
        scope: "weights" (weight matrices and kernels); "layers": also the biases of linear and
            convolutional layers; "all" parameters of the optimizer, gains and log-std too.
    """

    name: ClassVar[str] = "weight-decay"
    stage: ClassVar[Stage] = Stage.DECAY

    def __init__(
        self,
        strength: float = default("weight-decay", "strength"),
        scope: str = default("weight-decay", "scope"),
    ) -> None:
        super().__init__()
        check(self.name, {"strength": strength, "scope": scope})
        self.strength, self.scope = strength, scope

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._targets = in_scope(units, optimizer, self.scope)

    def before_step(self) -> None:
        if self.strength == 0:
            return
        for group, targets in zip(self._optimizer.param_groups, self._targets, strict=True):
            moved: list[Tensor] = [p for p in targets if p.grad is not None]
            if moved:
                scale_moving(self.clock, moved, 1 - group["lr"] * self.strength)
