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
    loss. sigma is the largest singular value of the weight `[out, in * kernel]`, estimated by one
    step of the power method per step of the optimizer from a vector that is kept: v ~ W^T u,
    u ~ W v, sigma = u^T W v, whose gradient is u v^T. All layers count, the output layer too.

    Args:
        strength: 1e-4 to 1e-3 in the paper's supervised experiments.
        exponent: k.
        biases: whether the biases' term counts, and with it norms: |offset|^2k, and (gain - 1)^2
            per unit.

    Deviations: the power method starts with 20 steps at `attach`. The paper leaves the form of the
    norms' terms open.
    """

    name: ClassVar[str] = "spectral"
    stage: ClassVar[Stage] = Stage.DECAY

    u: Tensor

    def __init__(
        self,
        strength: float = default("spectral", "strength"),
        exponent: float = default("spectral", "exponent"),
        biases: bool = default("spectral", "biases"),
    ) -> None:
        super().__init__()
        check(self.name, {"strength": strength, "exponent": exponent, "biases": biases})
        self.strength, self.exponent, self.biases = strength, exponent, biases

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

        self.register_buffer("u", zeros(count).transpose(0, 1).contiguous())
        self._u = self.u.transpose(0, 1)
        self._images, self._slopes = zeros(2 * count + pulled), zeros(count + pulled)
        self._above, self._pulled = self._images[:count], self._images[: count + pulled]
        self._left = [self._above[k, :, :n] for k, (n, _) in enumerate(sizes)]
        self._biases = [self._images[count + k, :, :n] for k, n in enumerate(lengths)]
        self._right = [self._images[count + pulled + k, :, :m] for k, (_, m) in enumerate(sizes)]
        self._start = [self._u[k, :, :n] for k, (n, _) in enumerate(sizes)]
        self._pushes = [self._slopes[k, :, :n] for k, (n, _) in enumerate(sizes)]
        self._columns = [push.t() for push in self._pushes]
        self._quiet = [self._slopes[count + k, :, :n] for k, n in enumerate(lengths)]
        self._pointers: list[int] = []
        self._operands: list[tuple[Tensor, ...]] = []
        self._flat_grads: list[tuple[Tensor | None, Tensor]] = [(None, self.u)] * count
        for k, start in enumerate(self._start):
            draw = self._stream(_START, k + 1).normal(start.shape[-1])
            start.copy_(draw / draw.norm(dim=-1, keepdim=True))
        for _ in range(_ITERATIONS):
            self._iterate()

    def before_step(self) -> None:
        if self.strength == 0:
            return
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
        torch.mul(self._pulled, slope, out=self._slopes)
        self._push(2 * k * self.strength)

    def _iterate(self) -> Tensor:
        """One step of the power method.

        Leaves W W^T u, the biases, and W^T u in `_images`; returns their lengths `[vectors, S, 1]`.
        """
        alone = self.clock.copies == 1 and not torch.compiler.is_compiling()
        if alone:
            for transposed, matrix, start, right, left in self._products():
                torch.mv(transposed, start, out=right)
                torch.mv(matrix, right, out=left)
        else:
            for layer, start, right, left in zip(
                self._layers, self._start, self._right, self._left, strict=True
            ):
                matrix = layer.weight.flatten(2)
                right.copy_(torch.bmm(start.unsqueeze(1), matrix).squeeze(1))
                left.copy_(torch.bmm(matrix, right.unsqueeze(-1)).squeeze(-1))
        if self._vectors:
            torch._foreach_copy_(self._biases, self._lead(self._vectors))
        lengths = torch.linalg.vector_norm(self._images, dim=-1, keepdim=True)
        # A layer of zeros has no slope.
        lengths.clamp_(min=torch.finfo(lengths.dtype).tiny ** 0.25)
        above = lengths[: len(self._layers)]
        if alone and self.clock.mask is None:
            torch.div(self._above, above, out=self._u)
        else:
            self.u.copy_(self.clock.keep((self._above / above).transpose(0, 1), self.u))
        return lengths

    def _products(self) -> list[tuple[Tensor, ...]]:
        """Operands of the power method where there is one copy: views, made anew only when the
        weights have moved in memory."""
        pointers = [weight.data_ptr() for weight in self._weights]
        if pointers != self._pointers:
            self._pointers = pointers
            matrices = [layer.weight.flatten(2)[0] for layer in self._layers]
            vectors = zip(matrices, self._start, self._right, self._left, strict=True)
            self._operands = [(w.t(), w, u[0], right[0], left[0]) for w, u, right, left in vectors]
        return self._operands

    def _push(self, factor: float) -> None:
        """Add factor times the slopes to the gradients."""
        alone = self.clock.copies == 1 and not torch.compiler.is_compiling()
        for place, weight in enumerate(self._weights):
            grad, right = weight.grad, self._right[place]
            if grad is None:
                continue
            if self._batched and not alone:
                push = self._pushes[place]
                grad.baddbmm_(push.unsqueeze(-1), right.unsqueeze(1), alpha=factor)
            elif self._batched:
                known, flat = self._flat_grads[place]
                if known is not grad:  # our agents' gradients are tensors that stay
                    flat = grad[0]
                    self._flat_grads[place] = grad, flat
                flat.addmm_(self._columns[place], right, alpha=factor)
            elif grad.ndim == 2:
                grad.addmm_(self._columns[place], right, alpha=factor)
            else:
                grad.add_((self._columns[place] * right).view(grad.shape), alpha=factor)
        quiet = zip(self._vectors, self._quiet, strict=True)
        pairs = [(p.grad, row) for p, row in quiet if p.grad is not None]
        if pairs:
            grads, rows = [grad for grad, _ in pairs], [row for _, row in pairs]
            torch._foreach_add_(self._lead(grads), rows, alpha=factor)
        for gain in self._gains:
            if gain.grad is not None:
                gain.grad.add_(gain - 1, alpha=2 * self.strength)

    def _lead(self, tensors: list[Tensor]) -> list[Tensor]:
        """With the copies axis."""
        return tensors if self._batched else [tensor.unsqueeze(0) for tensor in tensors]
