"""Methods that change the optimizer itself."""

from __future__ import annotations

from typing import ClassVar

from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import Units


class AdamEqualBetas(Intervention):
    """Both averages of Adam forget equally fast: betas (0.99, 0.99).

    With equal betas no step exceeds the learning rate; with (0.9, 0.999) a jump of the gradient
    after silence moves weights by up to 3.16 of it (Dohare, Lan & Mahmood 2023).

    Args:
        beta: both betas.
    """

    name: ClassVar[str] = "adam-equal-betas"
    stage: ClassVar[Stage] = Stage.OPTIMIZER

    def __init__(self, beta: float = default("adam-equal-betas", "beta")) -> None:
        super().__init__()
        check(self.name, {"beta": beta})
        self.beta = beta

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            if "betas" not in group:
                raise ValueError(
                    f"{self.name} needs an optimizer with betas, such as Adam; "
                    f"{type(optimizer).__name__} has none"
                )
            group["betas"] = (self.beta, self.beta)
