"""Correlates of plasticity, measured on the activations that the units recorded last.

    metrics.measure(units)       # {"policy/0/dormant_fraction": ..., "policy/effective_rank": ...}

The functions take one layer's features `[..., rows, n]`, uncentred, and reduce the last axes only,
so that every copy has its own value. Rank metrics saturate at min(rows, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from perennial.plasticity.units import Site, Units

THRESHOLDS = {"dormant_fraction": 0.025, "dormant_fraction_0": 0.0, "dormant_fraction_0.1": 0.1}
RANKS = ("effective_rank", "stable_rank", "approximate_rank")


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


def singular_values(features: Tensor) -> Tensor:
    """Singular values `[..., min(rows, n)]`, descending, float64.

    From the eigenvalues of the smaller Gram matrix: values below 1e-7 of the largest are rounding
    and become 0. Several times faster than an SVD.
    """
    x = features.double()
    gram = x.mT @ x if x.shape[-1] <= x.shape[-2] else x @ x.mT
    squares = torch.linalg.eigvalsh(gram).flip(-1).clamp_(min=0.0)
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

    Not what the slippery-ant paper logs under this name: that is `srank`, an approximate rank.

    >>> round(stable_rank(torch.tensor([3.0, 1.0])).item(), 3)
    1.111
    """
    squares = sigma.square()
    largest = squares.amax(-1)
    return squares.sum(-1) / torch.where(largest > 0, largest, 1.0)


def approximate_rank(sigma: Tensor, share: float = 0.99) -> Tensor:
    """Fewest singular values whose squares make up `share` of the sum of squares; 0 for zeros.

    >>> approximate_rank(torch.tensor([9.0, 1.0])).item(), approximate_rank(torch.tensor([10.0,
    1.0])).item() (2.0, 1.0)
    """
    squares = sigma.square().sort(-1, descending=True).values
    total = squares.sum(-1, keepdim=True)
    before = squares.cumsum(-1) - squares  # sum of the larger ones
    return ((before < share * total) & (squares > 0)).sum(-1).to(sigma.dtype)


_RANK_OF = {
    "effective_rank": effective_rank,
    "stable_rank": stable_rank,
    "approximate_rank": approximate_rank,
}


@torch.no_grad()
def measure(units: Units, *, ranks: str = "last") -> dict[str, float] | dict[str, Tensor]:
    """Metrics of every layer (`<net>/<layer>/<metric>`) and network (`<net>/<metric>`).

    Args:
        units: with activations recorded by a training forward, or inside `units.recording()`.
        ranks: of the "last" hidden layer of each network, of "all" hidden layers, or "none".

    Returns:
        Floats; for batched models float64 tensors `[S]` on the CPU. Fractions of a network are over
        all its units; its ranks those of its last hidden layer; its norms over all its weights.
        Gradient norms are of the gradients as they are now (clipped, with penalties), and absent
        before the first. Sites without activations yet are left out.
    """
    if ranks not in ("last", "all", "none"):
        raise ValueError(f"ranks={ranks!r} is unknown; use last, all or none")
    found: dict[str, Tensor] = {}
    recorded = [site for site in units if site.raw is not None]
    _activity(found, recorded)
    last = {site.net: site for site in recorded}
    for site in recorded:
        if ranks == "all" or (ranks == "last" and last[site.net] is site):
            sigma = singular_values(site.activation)
            for name in RANKS:
                value = _RANK_OF[name](sigma)
                found[f"{site.key}/{name}"] = value
                if last[site.net] is site:
                    found[f"{site.net}/{name}"] = value
    _norms(found, units)
    if not found:
        return {}
    table = torch.stack([value.double() for value in found.values()]).cpu()
    if units.batched:
        return dict(zip(found, table, strict=True))
    return dict(zip(found, table[:, 0].tolist(), strict=True))


def _activity(found: dict[str, Tensor], sites: list[Site]) -> None:
    """Dormant and dead fractions: of a network as sum over sum, not as mean of its layers'."""
    totals: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for site in sites:
        size = mean_size(site.activation)
        counts = {name: dormant(size, tau).sum(-1) for name, tau in THRESHOLDS.items()}
        counts["dead_fraction"] = dead(size).sum(-1)
        sizes[site.net] = sizes.get(site.net, 0) + site.n
        for name, count in counts.items():
            found[f"{site.key}/{name}"] = count / site.n
            key = f"{site.net}/{name}"
            totals[key] = totals[key] + count if key in totals else count
    for key, count in totals.items():
        found[key] = count / sizes[key.rpartition("/")[0]]


def _norms(found: dict[str, Tensor], units: Units) -> None:
    """Weight and gradient norms of every layer, the output layers included."""
    sums: dict[str, list[Tensor]] = {}
    for layer in units.layers:
        weight = layer.weight.flatten(1)
        square, size = weight.square().sum(-1), weight.abs().sum(-1)
        found[f"{layer.key}/weight_norm"] = square.sqrt()
        found[f"{layer.key}/weight_magnitude"] = size / weight.shape[1]
        count = torch.full_like(size, weight.shape[1])
        parts = [square, size, count]
        grad = layer.module.weight.grad
        if isinstance(grad, Tensor):
            squares = (grad if layer.batched else grad.unsqueeze(0)).flatten(1).square().sum(-1)
            found[f"{layer.key}/gradient_norm"] = squares.sqrt()
            parts.append(squares)
        before = sums.get(layer.net)
        sums[layer.net] = (
            parts if before is None else [a + b for a, b in zip(before, parts, strict=False)]
        )
    for net, (square, size, count, *gradient) in sums.items():
        found[f"{net}/weight_norm"] = square.sqrt()
        found[f"{net}/weight_magnitude"] = size / count
        for total in gradient:
            found[f"{net}/gradient_norm"] = total.sqrt()
