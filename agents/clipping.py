"""Gradient clipping per seed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Clip:
    """Scales each seed's gradients to a norm of at most `limit`; None: never.

    Args:
        parameters: every one [S, ...]; those whose gradient is None when first clipped are left
            out. Gradients must be tensors that stay.
        limit: of the L2 norm over all parameters of a seed.
    """

    def __init__(self, parameters: Iterable[Tensor], limit: float | None):
        self.parameters, self.limit = list(parameters), limit
        self.gradients: list[Tensor] = []
        self.flat: list[Tensor] = []
        self.scale: Tensor | None = None  # [S, 1], of the latest step

    def __call__(self) -> None:
        """Scale the gradients as they are now."""
        if self.limit is None:
            return
        if not self.flat:  # views are made once
            self.gradients = [p.grad for p in self.parameters if p.grad is not None]
            self.flat = [g.view(len(g), 1, -1) for g in self.gradients]
        squares = torch.cat([torch.bmm(g, g.mT) for g in self.flat], dim=-1)  # [S, 1, tensors]
        self.scale = (self.limit / (squares.sum(-1).sqrt_().add_(1e-6))).clamp_(max=1.0)
        if len(self.scale) == 1:
            # Most steps need none; asking is free on a CPU, where a pass over all gradients is not.
            if self.scale.is_cpu and float(self.scale) >= 1.0:
                return
            torch._foreach_mul_(self.gradients, self.scale[0, 0])
        else:
            for g in self.flat:
                g.mul_(self.scale[..., None])
