"""One seed's part of a network of several copies, for checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weights_of(net: nn.Module, copy: int) -> dict[str, Tensor]:
    """One copy's weights and buffers, on the CPU."""
    return {name: value[copy].detach().cpu() for name, value in net.state_dict().items()}


@torch.no_grad()
def load_weights(net: nn.Module, copy: int, weights: dict[str, Tensor]) -> None:
    """Write what `weights_of` returned."""
    own = net.state_dict()
    for name, value in weights.items():
        own[name][copy].copy_(value)
