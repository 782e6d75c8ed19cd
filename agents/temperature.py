"""SAC's temperature: how much entropy is worth, fixed or learned, one number per seed."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perennial.agents.aside import Step, in_turn
from perennial.agents.config import SACConfig
from perennial.plasticity import kernels
from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.base import Intervention
from perennial.plasticity.categorical import Loss
from perennial.plasticity.fresh import forget


def temperature_loss(log: Tensor, log_prob: Tensor, target: float) -> Loss:
    """-log * (mean log density + target) [S], and its gradient by `log` [S, 1]; log_prob [S, B]."""
    surplus = log_prob.mean(-1, keepdim=True) + target
    return Loss(-(log * surplus)[:, 0], -surplus)


class Temperature:
    """exp(log) of seeds' parameters `log` [S, 1], and their Adam.

    Args:
        target: the entropy that learning aims at.
    """

    def __init__(self, config: SACConfig, copies: int, target: float, device: str, dtype: Any):
        self.learned, self.target = config.learns_ent_coef, target
        self.first = math.log(config.first_ent_coef)
        self.log = nn.Parameter(torch.full((copies, 1), self.first).to(device, dtype))
        self.log.grad = torch.zeros_like(self.log)
        self.optimizer = BatchedAdam([self.log], config.learning_rate)

    def learn_later(self, log_prob: Tensor, ent_coef: Tensor, loss: Tensor) -> Step:
        """One step towards the target entropy from log densities [S, B]; the temperature before it
        and the loss go into the last two, [S] each."""
        log, grad = self.log.detach(), self.log.grad
        assert grad is not None
        given = log_prob, log, ent_coef, loss, grad
        measure: Step
        if kernels.ready(*given):
            measure = partial(_surplus, self.target, *map(kernels.array, given))
        else:

            def measure() -> None:
                ent_coef.copy_(log[:, 0].exp())
                found = temperature_loss(log, log_prob, self.target)
                loss.copy_(found.value)
                grad.copy_(found.gradient)

        return in_turn([measure, self.optimizer.move if self.learned else loss.zero_])

    @torch.no_grad()
    def restart(self, copies: Tensor) -> None:
        """Begin anew where `copies` [S] is true."""
        self.log.copy_(torch.where(copies[:, None], self.first, self.log))
        forget(self.optimizer, [self.log], copies)

    def state(self, copy: int) -> dict[str, Any]:
        """One seed's temperature and Adam."""
        return {
            "log_ent_coef": self.log.detach()[copy].cpu(),
            "ent_optimizer": self.optimizer.state_of(copy),
        }

    @torch.no_grad()
    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        self.log[copy].copy_(state["log_ent_coef"])
        self.optimizer.load_state_of(copy, state["ent_optimizer"])


class RestartsWithActor(Intervention):
    """Attached beside the actor's methods: its full reset is also the temperature's.

    Nikishin et al. 2022 (arXiv 2205.07802) build a whole new agent.
    """

    name: ClassVar[str] = "temperature"

    def __init__(self, temperature: Temperature) -> None:
        super().__init__()
        self._temperature = temperature

    def _restarted(self, copies: Tensor) -> None:
        self._temperature.restart(copies)


@kernels.compiled
def _surplus(target, log_prob, log, ent_coef, loss, grad):  # type: ignore[no-untyped-def]
    """`temperature_loss` and the temperature, into the last three."""
    for c in range(log_prob.shape[0]):
        total = 0.0
        for r in range(log_prob.shape[1]):
            total += log_prob[c, r]
        surplus = total / log_prob.shape[1] + target
        ent_coef[c] = math.exp(log[c, 0])
        loss[c], grad[c, 0] = -log[c, 0] * surplus, -surplus
