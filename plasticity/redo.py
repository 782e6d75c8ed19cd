"""ReDo: every so many steps, units that are hardly ever active start anew."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity import dormancy
from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.copies import Init
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import Units

_PAPER = Init("xavier-uniform")


class ReDo(Intervention):
    """Sokar, Agarwal, Castro & Evci, The dormant neuron phenomenon in deep reinforcement learning,
    ICML 2023 (arXiv 2302.12902).

    A unit is dormant when its mean |activation| is at most `threshold` times the average of its
    layer. Every `every` steps all dormant units get fresh incoming weights, their initial bias and
    silent outgoing weights. In a layer of zeros every unit is dormant.

    Args:
        threshold: tau. The paper's is 0.025 for DQN at the usual replay ratio, else 0.1; the
            published PPO runs have 0.1. Negative: nothing ever happens.
        every: steps of the optimizer; 1000 in the paper, 100 minibatches in the PPO runs.
        batches: minibatches, the last of each period, over which activations are averaged. One
            small minibatch takes units that are active rarely for dormant.
        moments: what becomes of the optimizer's averages: "exact" (stepped as newborn), "zero"
            (only zeroed: the first step is then up to 3.16 learning rates), "keep".
        reference: "exact"; "paper" as Dopamine does (Xavier-uniform redraw, bias 0, averages
            zeroed); "nature" as the PPO runs of Dohare et al. 2024 (averages kept, a layer of
            zeros left alone). Both override `moments`; neither sets threshold or period.

    Deviations: the statistics are the training minibatches', after their step, not a fresh batch of
    the replay memory. Where both ends of a weight are recycled it is zero, as in Dopamine. Channels
    that are flattened are found by the probe (Dopamine repeats the mask where it has to tile it).
    "paper" zeroes biases' averages too. Sites with an obstacle (residual streams) are left out.
    """

    name: ClassVar[str] = "redo"
    stage: ClassVar[Stage] = Stage.RECYCLE
    observes: ClassVar[bool] = True

    score: Tensor  # [S, total]: sum over the period's minibatches of E|h|
    replaced: Tensor

    def __init__(
        self,
        threshold: float = default("redo", "threshold"),
        every: int = default("redo", "every"),
        batches: int = default("redo", "batches"),
        moments: str = default("redo", "moments"),
        reference: str = default("redo", "reference"),
    ) -> None:
        super().__init__()
        given = {"threshold": threshold, "every": every, "batches": batches}
        check("redo", given | {"moments": moments, "reference": reference})
        self.threshold, self.every = threshold, every
        self.batches = min(batches, every)
        self.treatment = {"exact": moments, "paper": "zero", "nature": "keep"}[reference]
        self.reference = reference

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._sites = dormancy.recyclable(units, self.name)
        shape, device = (units.copies, units.total), units.device
        self.register_buffer("score", torch.zeros(shape, dtype=units.dtype, device=device))
        self.register_buffer("replaced", torch.zeros(shape[0], dtype=torch.int64, device=device))

    def _restarted(self, copies: Tensor) -> None:
        dormancy.forget(self.score, copies)

    def after_step(self) -> None:
        if self.threshold < 0:
            return
        observed = dormancy.in_window(self.clock, self.every, self.batches)
        if observed is None:
            return
        for _, site, span in self._sites:
            score = self.score[:, span]
            size = site.activation.abs().mean(1)
            score.copy_(torch.where(observed.unsqueeze(-1), score + size, score))
        due = self.clock.due(self.every)
        if due is None:
            return
        alive = due
        if self.reference == "nature":  # 0/0 there: no unit is below
            sums = [self.score[:, span].sum(-1) for span in self.units.spans]
            alive = due.unsqueeze(-1) & (torch.stack(sums, -1) > 0)
        selections = dormancy.below(self._sites, self.score, self.threshold, alive)
        init = _PAPER if self.reference == "paper" else None
        self._recycle(selections, treatment=self.treatment, init=init)
        dormancy.forget(self.score, due)
