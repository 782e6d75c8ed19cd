"""What units do on a batch: silent, stuck, linear, or the same as another.

Features are `[..., rows, n]`, after the nonlinearity; everything keeps the leading axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS = 0.99  # share of rows on which a unit must be flat to count as saturated


def mean_size(features: Tensor) -> Tensor:
    """E|h| of each unit: `[..., rows, n]` -> `[..., n]`."""
    return features.abs().mean(-2)


def dormant(size: Tensor, threshold: float) -> Tensor:
    """Units with E|h| at most `threshold` times their layer's average (Sokar et al. 2023, ReDo).

    size: E|h| `[..., n]`; bool of the same shape. In a layer of zeros every unit is dormant.

    >>> dormant(torch.tensor([0.0, 1.0, 1.0, 2.0]), 0.025)
    tensor([ True, False, False, False])
    """
    return size <= threshold * size.mean(-1, keepdim=True)


def dead(size: Tensor) -> Tensor:
    """Units that are exactly zero on every row; size: E|h| `[..., n]`."""
    return size == 0


def saturated(features: Tensor, nonlinearity: str) -> Tensor:
    """Units on a flat end of their nonlinearity on at least 99 % of rows, bool `[..., n]`.

    Flat: 0 of a ReLU; beyond 0.99 of tanh's range; within 0.01 of 0 or 1 of a sigmoid. Leaky ReLU
    has no flat end.
    """
    if nonlinearity == "relu":
        moving = features.sign()
    elif nonlinearity == "tanh":
        moving = (0.99 - features.abs()).sign_()
    elif nonlinearity == "sigmoid":
        moving = (0.49 - (features - 0.5).abs_()).sign_()
    else:
        return torch.zeros_like(features[..., 0, :], dtype=torch.bool)
    # A mean of signs is much faster than one of truth values.
    return moving.clamp_(min=0).sum(-2) <= (1 - ROWS) * features.shape[-2]


def linearised(features: Tensor, nonlinearity: str) -> Tensor:
    """Units whose nonlinearity is a straight line with a slope on all rows, bool `[..., n]`.

    ReLU: active on every row (leaky ReLU: or on none); tanh and sigmoid: slope within 1 % of the
    largest. For "crelu" features are `[..., rows, n, 2]`, and either half is active on every row.
    """
    if nonlinearity == "tanh":
        return features.abs().amax(-2) <= 0.1
    if nonlinearity == "sigmoid":
        return (features - 0.5).abs_().amax(-2) <= 0.05
    if nonlinearity == "crelu":
        return (features.amin(-3) > 0).any(-1)
    active = features.amin(-2) > 0
    return active | (features.amax(-2) < 0) if nonlinearity == "leaky-relu" else active


def feature_norm(features: Tensor) -> Tensor:
    """Mean over rows of the Euclidean norm over units, `[...]`."""
    return torch.linalg.vector_norm(features, dim=-1).mean(-1)


def duplicates(products: Tensor, cosine: float = 0.99) -> Tensor:
    """Units whose activations point the same way as another unit's, bool `[..., n]`.

    products: of units, `[..., n, n]`, as `ranks.gram` has them. Silent units are no duplicates.
    """
    sizes = products.diagonal(dim1=-2, dim2=-1)
    lengths = torch.where(sizes > 0, sizes, torch.inf).sqrt()
    cosines = products / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2))
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    return cosines.amax(-1) > cosine


def drift(mean: Tensor, std: Tensor, old_mean: Tensor, old_std: Tensor) -> Tensor:
    """Wasserstein-2 distance of each unit's pre-activations, taken as Gaussians; all `[..., n]`."""
    return torch.hypot(mean - old_mean, std - old_std)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy of a diagonal Gaussian policy in nats, log standard deviations `[..., actions]`.

    It does not see means that collapse where log_std is free of the state.

    >>> round(gaussian_entropy(torch.zeros(1)).item(), 4)
    1.4189
    """
    return log_std.sum(-1) + log_std.shape[-1] * 0.5 * math.log(2 * math.pi * math.e)


def categorical_entropy(logits: Tensor) -> Tensor:
    """Mean entropy in nats over rows of a policy over discrete actions: `[..., rows, actions]`."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean(-1)
