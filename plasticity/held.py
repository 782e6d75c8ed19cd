"""Gradients of penalties that are computed now and then and added at every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perennial.plasticity.flat import SideBySide, flatten


class Held:
    """Keeps one pull per parameter as buffers `pull_<k>` `[S, ...]` of a method.

    Args:
        owner: the method, whose state the pulls are.
        parameters: what they are added to.
        batched: whether the parameters carry the copies axis.
    """

    def __init__(self, owner: nn.Module, parameters: Sequence[nn.Parameter], batched: bool) -> None:
        self.parameters = list(parameters)
        self.pulls: list[Tensor] = []
        for number, p in enumerate(self.parameters):
            shape = p.shape if batched else (1, *p.shape)
            owner.register_buffer(f"pull_{number}", p.new_zeros(shape).detach())
            self.pulls.append(owner.get_buffer(f"pull_{number}"))
        if batched:
            flatten(self.pulls)
        # Elsewhere gradients are new tensors at every step.
        self._flat = SideBySide() if batched else None
        self._seen = [pull if batched else pull[0] for pull in self.pulls]

    def replace(self, pulls: Sequence[Tensor], due: Tensor) -> None:
        """New pulls for the copies that are due, bool `[S]`."""
        for old, new in zip(self.pulls, pulls, strict=True):
            old.copy_(torch.where(due.view(-1, *[1] * (old.ndim - 1)), new, old))

    def add(self) -> None:
        """Add the pulls to the gradients that there are."""
        pairs = [
            (p.grad, pull)
            for p, pull in zip(self.parameters, self._seen, strict=True)
            if p.grad is not None
        ]
        if not pairs:
            return
        grads, pulls = [grad for grad, _ in pairs], [pull for _, pull in pairs]
        spans = self._flat.spans(grads, pulls) if self._flat is not None else None
        if spans is not None:
            grads, pulls = ([run[k] for run in spans] for k in (0, 1))
        torch._foreach_add_(grads, pulls)
