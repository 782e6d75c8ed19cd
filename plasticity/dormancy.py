"""What recycling by a score has in common: which sites, which steps count, who is below."""

from __future__ import annotations

import torch
from torch import Tensor

from perennial.plasticity import metrics
from perennial.plasticity.clock import Clock
from perennial.plasticity.surgery import Selection
from perennial.plasticity.units import Site, Units

Sites = list[tuple[int, Site, slice]]


def recyclable(units: Units, method: str) -> Sites:
    """(position, site, its place in vectors over all units) of the sites without an obstacle."""
    found = [
        (position, site, span)
        for position, (site, span) in enumerate(zip(units, units.spans, strict=True))
        if not site.obstacle
    ]
    if not found:
        reasons = "; ".join(f"{s.name}: {s.obstacle}" for s in units) or "no hidden layers"
        raise ValueError(f"{method} finds no units to recycle ({reasons})")
    return found


def in_window(clock: Clock, every: int, width: int, ahead: int = 0) -> Tensor | None:
    """Copies `[S]` whose current step is among the last `width` of a period of `every` steps.

    None when the host knows that there is none: return early then.

    ahead: 1 in `before_step`, where the current step is not counted yet.
    """
    first, known = every - width, clock.known
    if known is not None:
        for copy in clock.current():
            if (known[copy] + ahead - 1) % every >= first:
                break
        else:
            return None
    inside = (clock.updates + (ahead - 1)) % every >= first
    return inside if clock.mask is None else inside & clock.mask


def below(sites: Sites, score: Tensor, threshold: float, due: Tensor) -> list[Selection]:
    """Units with a score of at most `threshold` times their layer's average, in copies that are
    due.

    score: `[S, total]`, >= 0; due: bool `[S]`, or `[S, number of sites of the units]`.
    """
    selections = []
    for position, site, span in sites:
        now = due if due.ndim == 1 else due[:, position]
        mask = metrics.dormant(score[:, span], threshold) & now.unsqueeze(-1)
        selections.append(Selection.from_mask(position, site, mask))
    return selections


def forget(score: Tensor, copies: Tensor) -> None:
    """A new period begins for these copies (bool `[S]`); no product, which would keep a NaN."""
    score.copy_(torch.where(copies.unsqueeze(-1), 0, score))
