"""Parseval regularisation: the rows of hidden layers stay orthogonal."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.held import Held
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import Layer, Units


class Parseval(Intervention):
    """Chung, Cherif, Precup & Meger, Parseval regularization for continual reinforcement learning,
    NeurIPS 2024 (arXiv 2412.07224).

    The gradient of `strength * (64 / out)^2 * |W W^T - s I|^2` joins that of the loss, for every
    hidden layer's weight W `[out, in * kernel]`; output layers are left out. With in < out the
    minimum is not zero, as the paper has it too.

    Args:
        strength: 1e-3 (MetaWorld) or 1e-4 in the paper.
        scale: s, the squared norm of a row. 0 takes it from the weights at `attach`, as |W|^2 over
            min(out, in): the squared gain of an orthogonal initialisation.
        groups: rows are orthogonal within each of so many groups of consecutive rows.
        normalize: rows are divided by their norms first, so that only angles count (s is then 1
            unless given).
        every: steps of the optimizer between computations of the gradient, which costs as much as
            a training step at small minibatches. Between them the last one is added. 1 is exact.

    Deviations: the learnable diagonal that the paper adds after each layer is not part of it.
    """

    name: ClassVar[str] = "parseval"
    stage: ClassVar[Stage] = Stage.DECAY

    scales: Tensor

    def __init__(
        self,
        strength: float = default("parseval", "strength"),
        scale: float = default("parseval", "scale"),
        groups: int = default("parseval", "groups"),
        normalize: bool = default("parseval", "normalize"),
        every: int = default("parseval", "every"),
    ) -> None:
        super().__init__()
        given = {"strength": strength, "scale": scale, "groups": groups, "normalize": normalize}
        check(self.name, given | {"every": every})
        self.strength, self.scale, self.groups = strength, scale, groups
        self.normalize, self.every = normalize, every

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._layers = list({site.producer: None for site in units})
        if not self._layers:
            raise ValueError("parseval finds no hidden layers that this optimizer owns")
        scales = []
        for layer in self._layers:
            weight = layer.weight.flatten(2)
            if weight.shape[1] % self.groups:
                raise ValueError(
                    f"parseval: {layer.name!r} has {weight.shape[1]} units, which groups="
                    f"{self.groups} does not divide; use a divisor"
                )
            measured = weight.square().sum((1, 2)) / min(weight.shape[1:])
            aim = self.scale or (1.0 if self.normalize else 0.0)
            scales.append(torch.full_like(measured, aim) if aim else measured)
        self.register_buffer("scales", torch.stack(scales, 1))  # [S, layers]
        self._held = Held(self, [layer.module.weight for layer in self._layers], units.batched)

    def before_step(self) -> None:
        if self.strength == 0:
            return
        due = self.clock.due(self.every)
        if due is not None:
            pulls = [self._pull(place, layer) for place, layer in enumerate(self._layers)]
            self._held.replace(pulls, due)
        self._held.add()

    def _pull(self, place: int, layer: Layer) -> Tensor:
        """The penalty's gradient, shaped as the weight with its copies axis.

        4 c (W W^T - s I) W, through the smaller of both products.
        """
        weight = layer.weight
        rows = weight.flatten(2)
        copies, n_out, _ = rows.shape
        rows = rows.reshape(copies * self.groups, n_out // self.groups, -1)
        factor = 4 * self.strength * (64 / n_out) ** 2
        scale = self.scales[:, place].repeat_interleave(self.groups).view(-1, 1)
        x = rows
        if self.normalize:
            lengths = rows.norm(dim=-1, keepdim=True).clamp_(min=torch.finfo(rows.dtype).tiny)
            x = rows / lengths
        wide = x.shape[1] <= x.shape[2]
        excess = torch.bmm(x, x.mT) if wide else torch.bmm(x.mT, x)
        excess.diagonal(dim1=-2, dim2=-1).sub_(scale)
        excess.mul_(factor)
        pull = torch.bmm(excess, x) if wide else torch.bmm(x, excess)
        if self.normalize:  # only the part across the row turns it
            pull = (pull - (pull * x).sum(-1, keepdim=True) * x) / lengths
        return pull.view(weight.shape)
