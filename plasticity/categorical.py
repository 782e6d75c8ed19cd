"""Arithmetic of categorical values: targets on a fixed support, cross-entropy, symlog."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """Loss per element `[...]` and its gradient by the network outputs `[..., m]`."""

    value: Tensor
    gradient: Tensor


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


def cross_entropy(logits: Tensor, target: Tensor) -> Loss:
    """`-sum target log softmax(logits)` over the last axis, target of mass 1.

    Its gradient, softmax - target, has an L1 norm of at most 2 whatever the size of the return.
    """
    log_p = logits.log_softmax(-1)
    return Loss(-(target * log_p).sum(-1), log_p.exp() - target)


def centres(low: float, high: float, bins: int, like: Tensor) -> Tensor:
    """`bins` points from low to high, both included."""
    return torch.linspace(low, high, bins, dtype=like.dtype, device=like.device)


def two_hot(place: Tensor, bins: int) -> Tensor:
    """Mass 1 shared by the two neighbours of `place` `[...]`, given in bins from the first centre:
    `[..., bins]`. A place that is a whole number has all its mass there."""
    ramp = torch.arange(bins, dtype=place.dtype, device=place.device)
    return (1 - (place.clamp(0, bins - 1).unsqueeze(-1) - ramp).abs()).clamp_(min=0)


def project(mass: Tensor, place: Tensor) -> Tensor:
    """Every atom's mass shared by the two neighbours of its place: both `[..., m]` -> `[..., m]`.

    The whole of a mass whose place is a whole number goes there: none is lost, unlike where the
    shares are `ceil - place` and `place - floor`.
    """
    mass, place = torch.broadcast_tensors(mass, place)
    bins = mass.shape[-1]
    place = place.clamp(0, bins - 1)
    if mass.device.type != "cpu":  # sums in a fixed order; scatters of a GPU have none
        return (mass.unsqueeze(-2) @ two_hot(place, bins)).squeeze(-2)
    floor = place.floor()
    share = place - floor
    lower = floor.long()
    upper = (lower + 1).clamp_(max=bins - 1)
    result = torch.zeros_like(mass).scatter_add_(-1, lower, mass * (1 - share))
    return result.scatter_add_(-1, upper, mass * share)
