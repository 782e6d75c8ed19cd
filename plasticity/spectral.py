"""Spectral regularisation: the largest singular value of every layer stays near 1."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import Units

_START = 1  # word of the stream of the first vectors
_ITERATIONS = 20  # of the power method at attach; afterwards one per step


class Spectral(Intervention):
    """Lewandowski, Bortkiewicz, Kumar, Gyorgy, Schuurmans, Ostaszewski & Machado, Learning
    continually by spectral regularization, ICLR 2025 (arXiv 2406.06811).

    The gradient of `strength * sum over layers of (sigma^k - 1)^2 + |bias|^2k` joins that of the
    loss. sigma is the largest singular value of the weight `[out, in * kernel]`, estimated by the
    power method, one step per `every` steps of the optimizer, from a vector that is kept:
    v ~ W^T u, u ~ W v, sigma = u^T W v, whose gradient is u v^T. All layers count, the output layer
    too.

    Args:
        strength: 1e-4 to 1e-3 in the paper's supervised experiments.
        exponent: k.
        biases: whether the biases' term counts, and with it norms: |offset|^2k, and (gain - 1)^2
            per unit.
        every: steps of the optimizer between steps of the power method. Between them the last
            gradient is added. 1 is the paper's and costs a tenth of a training step at minibatches
            of 128.

    Deviations: `every`; the power method starts with 20 steps at `attach`. The form of the biases'
    and the norms' terms is our reading of the paper.
    """

    name: ClassVar[str] = "spectral"
    stage: ClassVar[Stage] = Stage.DECAY

    u: Tensor
    push: Tensor
    right: Tensor

    def __init__(
        self,
        strength: float = default("spectral", "strength"),
        exponent: float = default("spectral", "exponent"),
        biases: bool = default("spectral", "biases"),
        every: int = default("spectral", "every"),
    ) -> None:
        super().__init__()
        given = {"strength": strength, "exponent": exponent, "biases": biases, "every": every}
        check(self.name, given)
        self.strength, self.exponent, self.biases = strength, exponent, biases
        self.every = every

    @torch.no_grad()
    def bind(self, units: Units, optimizer: Optimizer) -> None:
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        self._layers = [layer for layer in units.layers if layer.module.weight in owned]
        self._weights: list[Tensor] = [layer.module.weight for layer in self._layers]
        norms = {id(norm): norm for site in units for norm in site.norms}.values()
        vectors: list[Any] = [layer.module.bias for layer in self._layers]
        vectors += [getattr(norm, "bias", None) for norm in norms]
        gains: list[Any] = [getattr(norm, "weight", None) for norm in norms]
        self._vectors: list[Tensor] = [p for p in vectors if self.biases and p in owned]
        self._gains: list[Tensor] = [p for p in gains if self.biases and p in owned]
        self._batched = units.batched

        # All vectors side by side, padded with zeros, `[vectors, S, widest]`, so that one operation
        # serves all: W W^T u of every layer, then the biases, then W^T u of every layer.
        copies, count, pulled = self.clock.copies, len(self._layers), len(self._vectors)
        sizes = [layer.weight.flatten(2).shape[1:] for layer in self._layers]
        lengths = [p.shape[-1] for p in self._vectors]
        widest = max(*map(max, sizes), *lengths, 1)

        def zeros(rows: int) -> Tensor:
            return torch.zeros(rows, copies, widest, dtype=units.dtype, device=units.device)

        def state(name: str, rows: int) -> Tensor:
            """A buffer `[S, rows, widest]`, seen as `[rows, S, widest]`."""
            self.register_buffer(name, zeros(rows).transpose(0, 1).contiguous())
            return self.get_buffer(name).transpose(0, 1)

        # The gradient of a weight is push right^T; pushes of biases follow those of weights.
        self._u, self._right = state("u", count), state("right", count)
        self._push = state("push", count + pulled)
        self._images = zeros(2 * count + pulled)
        self._above, self._below = self._images[:count], self._images[count + pulled :]
        self._start = [self._u[k, :, :n] for k, (n, _) in enumerate(sizes)]
        self._lefts = [self._above[k, :, :n] for k, (n, _) in enumerate(sizes)]
        self._biases = [self._images[count + k, :, :n] for k, n in enumerate(lengths)]
        self._rights = [self._below[k, :, :m] for k, (_, m) in enumerate(sizes)]
        self._quiet = [self._push[count + k, :, :n] for k, n in enumerate(lengths)]
        # As they broadcast to the weight.
        self._columns, self._rows = [], []
        for k, (layer, (n, m)) in enumerate(zip(self._layers, sizes, strict=True)):
            shape = layer.weight.shape
            column = self._push[k, :, :n].view(copies, n, *[1] * (len(shape) - 2))
            row = self._right[k, :, :m].view(copies, 1, *shape[2:])
            self._columns.append(column if layer.batched else column[0])
            self._rows.append(row if layer.batched else row[0])
        self._pointers: list[int] = []
        self._operands: list[tuple[Tensor, ...]] = []
        for k, start in enumerate(self._start):
            draw = self._stream(_START, k + 1).normal(start.shape[-1])
            start.copy_(draw / draw.norm(dim=-1, keepdim=True))
        for _ in range(_ITERATIONS):
            above = self._iterate()[:count]
            self._u.copy_(self._above / above)

    def before_step(self) -> None:
        if self.strength == 0:
            return
        due = self.clock.due(self.every)
        if due is not None:
            self._compute(due)
        self._add(2 * self.exponent * self.strength)

    def _compute(self, due: Tensor) -> None:
        """One step of the power method, and what the gradients are made of."""
        lengths = self._iterate()
        count, rest, k = len(self._layers), -len(self._layers), self.exponent
        above, size, below = lengths[:count], lengths[count:rest], lengths[rest:]
        sigma = above / below
        # u v^T = (W W^T u) (W^T u)^T / (above below)
        if k == 2:
            slope = (sigma * sigma).sub_(1).div_(below).div_(below)
        else:
            slope = (sigma**k - 1) * sigma ** (k - 1) / (above * below)
        if self._vectors:
            slope = torch.cat((slope, size * size if k == 2 else size ** (2 * k - 2)))
        pulled = self._images[: len(self._push)]
        if self._alone() and self.clock.mask is None:
            torch.mul(pulled, slope, out=self._push)
            torch.div(self._above, above, out=self._u)
            self._right.copy_(self._below)
            return
        due = due.view(-1, 1)
        self._push.copy_(torch.where(due, pulled * slope, self._push))
        self._u.copy_(torch.where(due, self._above / above, self._u))
        self._right.copy_(torch.where(due, self._below, self._right))

    def _alone(self) -> bool:
        """One copy, as it mostly is, and no compiler: fewer and cheaper operations."""
        return self.clock.copies == 1 and not torch.compiler.is_compiling()

    def _iterate(self) -> Tensor:
        """W W^T u, the biases, W^T u into `_images`; returns their lengths `[vectors, S, 1]`."""
        if self._alone():
            for transposed, matrix, start, right, left in self._products():
                torch.mv(transposed, start, out=right)
                torch.mv(matrix, right, out=left)
        else:
            for layer, start, right, left in zip(
                self._layers, self._start, self._rights, self._lefts, strict=True
            ):
                matrix = layer.weight.flatten(2)
                right.copy_(torch.bmm(start.unsqueeze(1), matrix).squeeze(1))
                left.copy_(torch.bmm(matrix, right.unsqueeze(-1)).squeeze(-1))
        if self._vectors:
            torch._foreach_copy_(self._biases, self._lead(self._vectors))
        lengths = torch.linalg.vector_norm(self._images, dim=-1, keepdim=True)
        # A layer of zeros has no slope.
        return lengths.clamp_(min=torch.finfo(lengths.dtype).tiny ** 0.25)

    def _products(self) -> list[tuple[Tensor, ...]]:
        """Operands of the power method where there is one copy: views, made anew only when the
        weights have moved in memory."""
        pointers = [weight.data_ptr() for weight in self._weights]
        if pointers != self._pointers:
            self._pointers = pointers
            matrices = [layer.weight.flatten(2)[0] for layer in self._layers]
            vectors = zip(matrices, self._start, self._rights, self._lefts, strict=True)
            self._operands = [(w.t(), w, u[0], right[0], left[0]) for w, u, right, left in vectors]
        return self._operands

    def _add(self, factor: float) -> None:
        """Add factor times push right^T to the gradients of weights, and what biases get."""
        weights = [
            (p.grad, column, row)
            for p, column, row in zip(self._weights, self._columns, self._rows, strict=True)
            if p.grad is not None
        ]
        if weights:
            grads, columns, rows = (list(part) for part in zip(*weights, strict=True))
            torch._foreach_addcmul_(grads, columns, rows, value=factor)
        quiet = zip(self._vectors, self._quiet, strict=True)
        biases = [(p.grad, push) for p, push in quiet if p.grad is not None]
        if biases:
            grads, pushes = (list(part) for part in zip(*biases, strict=True))
            torch._foreach_add_(self._lead(grads), pushes, alpha=factor)
        for gain in self._gains:
            if gain.grad is not None:
                gain.grad.add_(gain - 1, alpha=2 * self.strength)

    def _lead(self, tensors: list[Tensor]) -> list[Tensor]:
        """With the copies axis."""
        return tensors if self._batched else [tensor.unsqueeze(0) for tensor in tensors]
