"""ReGraMa: every so many steps, units that hardly get a gradient start anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity import dormancy
from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import Site, Units


class ReGraMa(Intervention):
    """Liu, Wu, Obando-Ceron, Castro, Courville & Pan, Measure gradients, not activations!, NeurIPS
    2025 (arXiv 2505.24061).

    A unit's score is the mean |gradient| of its incoming weights and bias, relative to the average
    of its layer. Every `every` steps units whose score, averaged over the last `batches`
    minibatches, is at most `threshold` get fresh incoming weights, their initial bias and silent
    outgoing weights. It finds units that saturate, which activity does not show. In a layer whose
    gradients are zero every unit is below; a layer that took no part in the losses of the window
    (no gradient at all) is left alone.

    Args:
        threshold: of the relative score. Negative: nothing ever happens.
        every: steps of the optimizer.
        batches: minibatches, the last of each period, that are averaged: one is noisy. Each is
            relative to its own average, so that clipping and the loss's scale change nothing.
        moments: what becomes of the optimizer's averages: "exact" (stepped as newborn), "zero"
            (only zeroed), "keep".

    Deviations: public ports compare the raw gradient and keep outgoing weights; here the score is
    relative, as the paper says, and outgoing weights are silent, as in every recycling. Behind a
    layer norm even a dead unit's weights get a gradient, through the statistics of the norm; so the
    norm's gain and offset have a score too, and the lesser counts. Gradients are those of the loss:
    read before other methods' penalties join them. Sites with an obstacle (residual streams) are
    left out.
    """

    name: ClassVar[str] = "regrama"
    stage: ClassVar[Stage] = Stage.RECYCLE
    reads_gradients: ClassVar[bool] = True

    score: Tensor  # [S, total]: sum over the period's minibatches of the relative score
    seen: Tensor  # int64 [S, sites]: minibatches in it
    replaced: Tensor

    def __init__(
        self,
        threshold: float = default("regrama", "threshold"),
        every: int = default("regrama", "every"),
        batches: int = default("regrama", "batches"),
        moments: str = default("regrama", "moments"),
    ) -> None:
        super().__init__()
        given = {"threshold": threshold, "every": every, "batches": batches, "moments": moments}
        check("regrama", given)
        self.threshold, self.every = threshold, every
        self.batches, self.treatment = min(batches, every), moments

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._sites = dormancy.recyclable(units, self.name)
        copies, device = units.copies, units.device
        score = torch.zeros(copies, units.total, dtype=units.dtype, device=device)
        self.register_buffer("score", score)
        self.register_buffer(
            "seen", torch.zeros(copies, len(units), dtype=torch.int64, device=device)
        )
        self.register_buffer("replaced", torch.zeros(copies, dtype=torch.int64, device=device))

    def _restarted(self, copies: Tensor) -> None:
        dormancy.forget(self.score, copies)
        dormancy.forget(self.seen, copies)

    def before_step(self) -> None:
        if self.threshold < 0:
            return
        observed = dormancy.in_window(self.clock, self.every, self.batches, ahead=1)
        if observed is None:
            return
        for position, site, span in self._sites:
            sizes = gradient_sizes(site)
            if not sizes:
                continue
            relative = torch.stack([_relative(size) for size in sizes]).amin(0)
            score = self.score[:, span]
            score.copy_(torch.where(observed.unsqueeze(-1), score + relative, score))
            self.seen[:, position].add_(observed)

    def after_step(self) -> None:
        if self.threshold < 0:
            return
        due = self.clock.due(self.every)
        if due is None:
            return
        judged = due.unsqueeze(-1) & (self.seen > 0)
        selections = dormancy.below(self._sites, self.score, self.threshold, judged)
        self._recycle(selections, treatment=self.treatment)
        dormancy.forget(self.score, due)
        dormancy.forget(self.seen, due)


def gradient_sizes(site: Site) -> list[Tensor]:
    """Mean |gradient| of each unit `[S, n]`: over its incoming weights and bias, and over the gain
    and offset of every norm with them. Empty where there is no gradient."""
    layer = site.producer
    if layer.module.weight.grad is None:
        return []
    sizes = [_mean_size((layer.module.weight, layer.module.bias), layer.batched)]
    for norm in site.norms:
        gain = getattr(norm, "weight", None)
        if gain is not None and gain.grad is not None:
            sizes.append(_mean_size((gain, getattr(norm, "bias", None)), gain.ndim == 2))
    return sizes


def _mean_size(parameters: Sequence[Tensor | None], batched: bool) -> Tensor:
    sums, entries = [], 0
    for parameter in parameters:
        if parameter is not None and parameter.grad is not None:
            grad = parameter.grad if batched else parameter.grad.unsqueeze(0)
            sums.append(grad.abs().flatten(2).sum(-1) if grad.ndim > 2 else grad.abs())
            entries += grad[0, 0].numel()
    return torch.stack(sums).sum(0) / entries


def _relative(size: Tensor) -> Tensor:
    """Each unit's share of its layer's average; 0 where all are 0."""
    average = size.mean(-1, keepdim=True)
    return size / torch.where(average == 0, 1, average)
