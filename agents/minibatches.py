"""A rollout as rows, and rows in the order of an epoch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Transitions of S seeds, n each: a rollout or a minibatch of it."""

    observations: Tensor  # [S, n, *D], normalised, or images as bytes
    actions: Tensor  # [S, n, A]
    log_prob: Tensor  # [S, n] of the actions, under the policy that acted
    values: Tensor  # [S, n] of the value network that acted
    advantages: Tensor  # [S, n]
    returns: Tensor  # [S, n], targets of the value network


def standardised(x: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-8) along the last axis, as SB3 does."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8)


def shuffled(x: Tensor, order: Tensor) -> Tensor:
    """x [S, n, ...] with each seed's rows in its order [S, n]."""
    if x.shape[0] == 1:
        return x[0].index_select(0, order[0].to(x.device))[None]
    return torch.stack(
        [row.index_select(0, o.to(x.device)) for row, o in zip(x, order, strict=True)]
    )
