"""Correlates of plasticity, measured on the activations that the units recorded last.

    metrics.measure(units)       # {"policy/0/dormant_fraction": ..., "policy/effective_rank": ...}

registry.METRICS has one line about each. What they are made of are functions of tensors with the
copies axis first, here by name too: activity.py on units, ranks.py on singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perennial.plasticity.activity import categorical_entropy as categorical_entropy
from perennial.plasticity.activity import dead as dead
from perennial.plasticity.activity import dormant as dormant
from perennial.plasticity.activity import drift as drift
from perennial.plasticity.activity import duplicates as duplicates
from perennial.plasticity.activity import feature_norm as feature_norm
from perennial.plasticity.activity import gaussian_entropy as gaussian_entropy
from perennial.plasticity.activity import linearised as linearised
from perennial.plasticity.activity import mean_size as mean_size
from perennial.plasticity.activity import saturated as saturated
from perennial.plasticity.ranks import RANKS, from_gram, gram
from perennial.plasticity.ranks import approximate_rank as approximate_rank
from perennial.plasticity.ranks import effective_rank as effective_rank
from perennial.plasticity.ranks import feature_rank as feature_rank
from perennial.plasticity.ranks import participation_ratio as participation_ratio
from perennial.plasticity.ranks import singular_values as singular_values
from perennial.plasticity.ranks import srank as srank
from perennial.plasticity.ranks import stable_rank as stable_rank
from perennial.plasticity.units import Layer, Site, Units

THRESHOLDS = {"dormant_fraction": 0.025, "dormant_fraction_0": 0.0, "dormant_fraction_0.1": 0.1}


@torch.no_grad()
def measure(units: Units, *, ranks: str = "last") -> dict[str, float] | dict[str, Tensor]:
    """Metrics of every layer (`<net>/<layer>/<metric>`) and network (`<net>/<metric>`).

    Args:
        units: with activations recorded by a training forward, or inside `units.recording()`, which
            pre-activation drift needs.
        ranks: of the "last" hidden layer of each network, of "all" hidden layers, or "none";
            duplicate units come with them.

    Returns:
        Floats; for batched models float64 tensors `[S]` on the CPU. Fractions and means of a
        network are over all its units; its ranks, duplicates and feature norm those of its last
        hidden layer; its norms and distances over all its weights. Saturated and linearised units
        are told where `site.nonlinearity` is known. Gradients are as they are now (clipped, with
        penalties), and absent before the first. Sites without activations yet are left out.

    `units.references` takes note of the weights for the next `weight_change`.
    """
    if ranks not in ("last", "all", "none"):
        raise ValueError(f"ranks={ranks!r} is unknown; use last, all or none")
    found: dict[str, Tensor] = {}
    recorded = [site for site in units if site.raw is not None]
    last = {site.net: site for site in recorded}
    _activity(found, recorded, last)
    for site in recorded:
        if ranks == "all" or (ranks == "last" and last[site.net] is site):
            for name, value in _ranks(site).items():
                found[f"{site.key}/{name}"] = value
                if last[site.net] is site:
                    found[f"{site.net}/{name}"] = value
    _drift(found, units)
    _weights(found, units)
    if not found:
        return {}
    table = torch.stack([value.double() for value in found.values()]).cpu()
    if units.batched:
        return dict(zip(found, table, strict=True))
    return dict(zip(found, table[:, 0].tolist(), strict=True))


def _activity(found: dict[str, Tensor], sites: list[Site], last: dict[str, Site]) -> None:
    """Fractions: of a network as sum over sum, not as mean of its layers'."""
    totals: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for site in sites:
        features = site.activation
        size = features.mean(-2) if site.nonnegative else mean_size(features)
        counts = {name: dormant(size, tau).sum(-1) for name, tau in THRESHOLDS.items()}
        counts["dead_fraction"] = dead(size).sum(-1)
        kind = site.nonlinearity
        if kind and kind != "crelu":
            counts["saturated_fraction"] = saturated(features, kind).sum(-1)
        if kind:
            halves = site.features if kind == "crelu" else features
            counts["linearised_fraction"] = linearised(halves, kind).sum(-1)
        for name, count in counts.items():
            found[f"{site.key}/{name}"] = count / site.n
            key = f"{site.net}/{name}"
            totals[key] = totals[key] + count if key in totals else count
            sizes[key] = sizes.get(key, 0) + site.n
        norm = feature_norm(features)
        found[f"{site.key}/feature_norm"] = norm
        if last[site.net] is site:
            found[f"{site.net}/feature_norm"] = norm
    for key, count in totals.items():
        found[key] = count / sizes[key]


def _ranks(site: Site) -> dict[str, Tensor]:
    """Ranks of the features, and duplicate units, from the products of units."""
    features = site.activation
    rows = features.shape[-2]
    products = gram(features)
    sigma = from_gram(products if site.n <= rows else gram(features.mT))
    found = {name: rank(sigma, rows) for name, rank in RANKS.items()}
    return found | {"duplicate_fraction": duplicates(products).sum(-1) / site.n}


def _drift(found: dict[str, Tensor], units: Units) -> None:
    """Distance of pre-activations from the first ones."""
    nets: dict[str, list[Tensor]] = {}
    for site in units:
        before = units.references.compare(site)
        if before is not None and site.preactivation is not None:
            moved = drift(*site.preactivation, *before)
            found[f"{site.key}/preactivation_drift"] = moved.mean(-1)
            nets.setdefault(site.net, []).append(moved)
    for net, parts in nets.items():
        found[f"{net}/preactivation_drift"] = torch.cat(parts, -1).mean(-1)


def _weights(found: dict[str, Tensor], units: Units) -> None:
    """Norms and distances of every layer's weight and gradient, the output layers included."""
    sums: dict[str, dict[str, Tensor]] = {}
    for layer in units.layers:
        parts = _parts(layer, units)
        for name, value in _told(parts).items():
            found[f"{layer.key}/{name}"] = value
        before = sums.get(layer.net)
        sums[layer.net] = parts if before is None else _added(before, parts)
    for net, parts in sums.items():
        for name, value in _told(parts).items():
            found[f"{net}/{name}"] = value


def _parts(layer: Layer, units: Units) -> dict[str, Tensor]:
    """What adds up over layers, `[S]` each."""
    weight = layer.weight.flatten(1)
    references = units.references
    latest = references.latest[layer.key].flatten(1)
    parts = {
        "squares": _square(weight),
        "sizes": weight.abs().sum(-1),
        "count": weight.new_full(weight.shape[:1], weight.shape[1]),
        "distances": _square(weight - references.initial[layer.key].flatten(1)),
        "changes": _square(weight - latest),
        "before": _square(latest),
    }
    latest.copy_(weight)
    grad = layer.module.weight.grad
    if isinstance(grad, Tensor):
        grad = (grad if layer.batched else grad.unsqueeze(0)).flatten(1)
        parts["gradients"] = _square(grad)
        parts["zeros"] = weight.shape[1] - torch.count_nonzero(grad, -1)
    return parts


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square()


def _added(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: a[key] + b[key] if key in b else a[key] for key in a} | {
        key: value for key, value in b.items() if key not in a
    }


def _told(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of one layer or network from its sums."""
    count, before = parts["count"], parts["before"]
    found = {
        "weight_norm": parts["squares"].sqrt(),
        "weight_magnitude": parts["sizes"] / count,
        "distance_to_init": (parts["distances"] / count).sqrt(),
        "weight_change": (parts["changes"] / torch.where(before > 0, before, 1.0)).sqrt(),
    }
    if "gradients" in parts:
        found["gradient_norm"] = parts["gradients"].sqrt()
        found["gradient_zero_fraction"] = parts["zeros"] / count
    return found
