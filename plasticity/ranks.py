"""Ranks of features: one name per definition, because the literature uses some names twice.

All take singular values `[..., k]` and reduce the last axis only. They saturate at min(rows, n).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 96  # columns; measured best at 256 units on CPUs


def gram(features: Tensor) -> Tensor:
    """Products of units `[..., n, n]` of features `[..., rows, n]`, uncentred, in float64."""
    x = features.double()
    n = x.shape[-1]
    products = x.new_empty(*x.shape[:-2], n, n)
    for start in range(0, n, _BLOCK):  # the lower triangle by blocks, two thirds of the work
        stop = min(start + _BLOCK, n)
        products[..., start:, start:stop] = x[..., start:].mT @ x[..., start:stop]
        products[..., start:stop, stop:] = products[..., stop:, start:stop].mT
    return products


def singular_values(features: Tensor) -> Tensor:
    """Singular values `[..., min(rows, n)]` of features `[..., rows, n]`, descending, float64.

    From the eigenvalues of the smaller Gram matrix: values below 1e-7 of the largest are rounding
    and become 0. Several times faster than an SVD.
    """
    rows, n = features.shape[-2:]
    return from_gram(gram(features) if n <= rows else gram(features.mT))


def from_gram(products: Tensor) -> Tensor:
    """Singular values from a Gram matrix `[..., k, k]`: `[..., k]`, descending."""
    squares = torch.linalg.eigvalsh(products).flip(-1).clamp_(min=0.0)
    noise = 1e-14 * squares[..., :1]
    return torch.where(squares > noise, squares, 0.0).sqrt()


def effective_rank(sigma: Tensor) -> Tensor:
    """exp(entropy) of the normalised singular values (Roy & Vetterli 2007); 0 for a zero matrix.

    >>> round(effective_rank(torch.tensor([3.0, 1.0])).item(), 4)
    1.7548
    """
    total = sigma.sum(-1, keepdim=True)
    share = sigma / torch.where(total > 0, total, 1.0)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0)


def stable_rank(sigma: Tensor) -> Tensor:
    """Squared Frobenius norm over squared largest singular value; 0 for a zero matrix.

    Not what the slippery-ant paper logs under this name: that is `srank`.

    >>> round(stable_rank(torch.tensor([3.0, 1.0])).item(), 3)
    1.111
    """
    squares = sigma.square()
    largest = squares.amax(-1)
    return squares.sum(-1) / torch.where(largest > 0, largest, 1.0)


def participation_ratio(sigma: Tensor) -> Tensor:
    """(sum of squares)^2 over the sum of fourth powers; 0 for a zero matrix.

    >>> round(participation_ratio(torch.tensor([3.0, 1.0])).item(), 4)
    1.2195
    """
    squares = sigma.square()
    fourth = squares.square().sum(-1)
    return squares.sum(-1).square() / torch.where(fourth > 0, fourth, 1.0)


def srank(sigma: Tensor, delta: float = 0.01) -> Tensor:
    """Fewest singular values that make up 1 - delta of their sum (Kumar et al. 2021, arXiv
    2010.14498); 0 for a zero matrix.

    >>> srank(torch.tensor([3.0, 1.0])).item()
    2.0
    """
    return _fewest(sigma, 1 - delta)


def approximate_rank(sigma: Tensor, share: float = 0.99) -> Tensor:
    """Fewest singular values whose squares make up `share` of the sum of squares; 0 for zeros.

    >>> [approximate_rank(torch.tensor([large, 1.0])).item() for large in (9.0, 10.0)]
    [2.0, 1.0]
    """
    return _fewest(sigma.square(), share)


def feature_rank(sigma: Tensor, rows: int, threshold: float = 0.01) -> Tensor:
    """Singular values of features / sqrt(rows) above a threshold (Lyle et al. 2022, arXiv
    2204.09560): it depends on the features' scale.

    >>> feature_rank(torch.ones(4), rows=4).item(), feature_rank(torch.ones(4), rows=40_000).item()
    (4.0, 0.0)
    """
    return (sigma > threshold * rows**0.5).sum(-1).to(sigma.dtype)


def _fewest(values: Tensor, share: float) -> Tensor:
    """How many of the largest values make up a share of their sum."""
    values = values.sort(-1, descending=True).values
    total = values.sum(-1, keepdim=True)
    before = values.cumsum(-1) - values  # sum of the larger ones
    return ((before < share * total) & (values > 0)).sum(-1).to(values.dtype)


RANKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "effective_rank": lambda sigma, rows: effective_rank(sigma),
    "srank": lambda sigma, rows: srank(sigma),
    "approximate_rank": lambda sigma, rows: approximate_rank(sigma),
    "stable_rank": lambda sigma, rows: stable_rank(sigma),
    "participation_ratio": lambda sigma, rows: participation_ratio(sigma),
    "feature_rank": feature_rank,
}
