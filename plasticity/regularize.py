"""Penalties that enter as gradients: plain L2."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import Units


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
        least = 0 if self.scope == "all" else (3 if units.batched else 2)
        self._targets = [
            p for group in optimizer.param_groups for p in group["params"] if p.ndim >= least
        ]

    def before_step(self) -> None:
        if self.strength == 0:
            return
        pairs = [(p.grad, p.detach()) for p in self._targets if p.grad is not None]
        if pairs:
            grads, weights = [g for g, _ in pairs], [w for _, w in pairs]
            torch._foreach_add_(grads, weights, alpha=self.strength)
