"""Forward passes for acting, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from torch import nn

from perennial.agents.networks import MLP, norms_of
from perennial.plasticity.copies import BatchedLinear
from perennial.plasticity.norms import BatchedLayerNorm


class Acting:
    """Forward of a plain MLP for a few observations at a time, in numpy on the weights' own memory.

    One observation through 256-256 costs a third of what a torch forward does: there is little to
    compute, so what counts is the overhead of each operation.
    """

    _ACTIVATIONS: ClassVar[dict[type[nn.Module], Any]] = {
        nn.ReLU: lambda h: np.maximum(h, 0.0, out=h),
        nn.Tanh: lambda h: np.tanh(h, out=h),
    }

    def __init__(self, net: MLP):
        self.activate = self._ACTIVATIONS[type(net[-2])]
        norms = norms_of(net)
        layers = [m for m in net if isinstance(m, BatchedLinear)]
        copies = range(layers[0].copies)
        self.copies = [[_of(layer, norms.get(layer), s) for layer in layers] for s in copies]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Outputs [S, E, n_out] of observations [S, E, n_in]."""
        if len(self.copies) == 1:
            return self._one(x[0], self.copies[0])[None]
        return np.stack(
            [self._one(rows, layers) for rows, layers in zip(x, self.copies, strict=True)]
        )

    def _one(self, h: np.ndarray, layers: list[tuple[Any, ...]]) -> np.ndarray:
        for weight, bias, norm in layers[:-1]:
            h = h @ weight
            h += bias
            if norm is not None:
                h = norm(h)
            self.activate(h)
        weight, bias, _ = layers[-1]
        return h @ weight + bias


def _of(layer: BatchedLinear, norm: BatchedLayerNorm | None, copy: int) -> tuple[Any, ...]:
    """Weights, biases and norm of one copy, on their own memory."""
    assert layer.bias is not None
    weight, bias = layer.weight.detach()[copy], layer.bias.detach()[copy]
    return weight.numpy().T, bias.numpy(), norm and _norm(norm, copy)


def _norm(layer: BatchedLayerNorm, copy: int) -> Callable[[np.ndarray], np.ndarray]:
    """What a norm does to rows of one copy."""
    affine = [None if p is None else p.detach()[copy].numpy() for p in (layer.weight, layer.bias)]
    gain, offset = affine

    def run(h: np.ndarray) -> np.ndarray:
        h = h - h.mean(-1, keepdims=True)
        h /= np.sqrt(np.square(h).mean(-1, keepdims=True) + layer.eps)
        return h if gain is None else h * gain + offset

    return run
