"""The dueling network: a value and what each action adds to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perennial.plasticity.copies import BatchedLinear


class Dueling(nn.Module):
    """Two streams in place of the last two layers: Q = V + A - mean of A over actions.

    Wang et al., "Dueling network architectures for deep reinforcement learning", 2016
    (arXiv 1511.06581). For distributions the sum is of each of their m outputs. The paper's scaling
    of the trunk's gradient by 1/sqrt(2) is left out.
    """

    def __init__(self, net: nn.Sequential, outputs: int, generators: Sequence[torch.Generator]):
        """`net` ends in linear, activation, linear with n * m outputs; its parts are taken over.

        outputs: m per action.
        """
        super().__init__()
        *trunk, hidden, activation, last = net
        assert isinstance(hidden, BatchedLinear) and isinstance(last, BatchedLinear)
        self.actions = last.n_out // outputs
        self.trunk = nn.Sequential(*trunk)
        self.value = nn.Sequential(
            _like(hidden, hidden.n_out, generators),
            type(activation)(),
            _like(last, outputs, generators),
        )
        self.advantage = nn.Sequential(hidden, activation, last)

    def forward(self, x: Tensor) -> Tensor:  # [S, B, *D] -> [S, B, n * m]
        features = self.trunk(x)
        return self.join(self.value(features), self.advantage(features))

    def join(self, value: Tensor, advantage: Tensor) -> Tensor:
        """Q [..., n * m] of what the streams put out, [..., m] and [..., n * m]."""
        by_action = advantage.unflatten(-1, (self.actions, -1))
        centred = by_action + (value.unsqueeze(-2) - by_action.mean(-2, keepdim=True))
        return centred.flatten(-2)

    def part(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by value and advantage of one by Q."""
        by_action = gradient.unflatten(-1, (self.actions, -1))
        centred = by_action - by_action.mean(-2, keepdim=True)
        return by_action.sum(-2), centred.flatten(-2)


def _like(layer: BatchedLinear, n_out: int, generators: Sequence[torch.Generator]) -> BatchedLinear:
    return BatchedLinear(layer.copies, layer.n_in, n_out, init=layer.init, generators=generators)
