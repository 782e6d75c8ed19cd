"""Normalisation of pre-activations: the batched layer, and the method `layer-norm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity.architecture import Trunk, require_rewritten
from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.copies import BatchedConv2d, BatchedLinear
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import CONVOLUTIONS, Units


class BatchedLayerNorm(nn.Module):
    """`copies` layer norms over the last axis as one: gain and offset `[S, n]`.

    Args:
        copies: S.
        n: features of one copy.
        affine: whether there are gain (`weight`) and offset (`bias`).
        eps: added to the variance.

    >>> BatchedLayerNorm(3, 4)(torch.randn(3, 7, 4)).shape
    torch.Size([3, 7, 4])
    """

    normalizes_units = True  # find_units looks through it, though it mixes units

    def __init__(
        self,
        copies: int,
        n: int,
        *,
        affine: bool = True,
        eps: float = 1e-5,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if min(copies, n) < 1:
            raise ValueError(f"copies={copies} and n={n} must both be at least 1")
        self.copies, self.n, self.eps = copies, n, eps
        ones = torch.ones(copies, n, dtype=dtype, device=device)
        self.weight = nn.Parameter(ones) if affine else None
        self.bias = nn.Parameter(torch.zeros_like(ones)) if affine else None

    def forward(self, x: Tensor) -> Tensor:  # [S, B, n] -> [S, B, n]
        if self.weight is None or self.bias is None:
            return F.layer_norm(x, (self.n,), eps=self.eps)
        if self.copies == 1:  # the fused kernel
            return F.layer_norm(x, (self.n,), self.weight[0], self.bias[0], self.eps)
        normal = F.layer_norm(x, (self.n,), eps=self.eps)
        return torch.addcmul(self.bias.unsqueeze(1), normal, self.weight.unsqueeze(1))

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"copies={self.copies}, n={self.n}, affine={affine}, eps={self.eps:g}"


class BatchedImageNorm(nn.Module):
    """`copies` norms over channels and positions of an image as one: gain and offset `[S, n]`.

    Each image of each copy is normalised as a whole; `nn.GroupNorm(1, n)` of one copy.

    Args:
        copies: S.
        n: channels of one copy.
        affine: whether there are a gain (`weight`) and an offset (`bias`) per channel.
        eps: added to the variance.

    >>> BatchedImageNorm(3, 4)(torch.randn(3, 7, 4, 5, 5)).shape
    torch.Size([3, 7, 4, 5, 5])
    """

    normalizes_units = True  # find_units looks through it, though it mixes units

    def __init__(self, copies: int, n: int, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        if min(copies, n) < 1:
            raise ValueError(f"copies={copies} and n={n} must both be at least 1")
        self.copies, self.n, self.eps = copies, n, eps
        self.weight = nn.Parameter(torch.ones(copies, n)) if affine else None
        self.bias = nn.Parameter(torch.zeros(copies, n)) if affine else None

    def forward(self, x: Tensor) -> Tensor:  # [S, B, n, H, W] -> [S, B, n, H, W]
        if self.weight is None or self.bias is None:
            return F.layer_norm(x, x.shape[2:], eps=self.eps)
        if self.copies == 1:
            return F.group_norm(x[0], 1, self.weight[0], self.bias[0], self.eps).unsqueeze(0)
        normal = F.layer_norm(x, x.shape[2:], eps=self.eps)
        gain, offset = (p[:, None, :, None, None] for p in (self.weight, self.bias))
        return torch.addcmul(offset, normal, gain)

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"copies={self.copies}, n={self.n}, affine={affine}, eps={self.eps:g}"


def norm_after(layer: nn.Module, affine: bool = True) -> nn.Module:
    """A fresh norm of one row's pre-activations, as `layer` puts them out, on its device.

    Linear layers: `nn.LayerNorm`, batched ones `BatchedLayerNorm`. Convolutions: one group over
    channels and positions with a gain per channel (`nn.GroupNorm(1, channels)`, batched
    `BatchedImageNorm`), which needs no image size.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    norm: nn.Module
    if isinstance(layer, BatchedLinear):
        norm = BatchedLayerNorm(layer.copies, layer.n_out, affine=affine)
    elif isinstance(layer, BatchedConv2d):
        norm = BatchedImageNorm(layer.copies, layer.n_out, affine=affine)
    elif isinstance(layer, CONVOLUTIONS):
        norm = nn.GroupNorm(1, weight.shape[0], affine=affine)
    else:
        norm = nn.LayerNorm(weight.shape[0], elementwise_affine=affine)
    return norm.to(weight.device, weight.dtype)


class LayerNormalization(Intervention):
    """Layer normalisation of the pre-activations of every hidden layer.

    Lyle et al. 2024, Disentangling the Causes of Plasticity Loss (arXiv 2402.18762); the layer: Ba,
    Kiros & Hinton 2016 (arXiv 1607.06450). The norm stands before the nonlinearity: it stops the
    drift of pre-activations, and its mean and variance lead gradient to units that are silent. They
    pair it with `weight-decay`. Hidden layers that have a norm already keep it.

    Args:
        affine: learn a gain and an offset per unit.

    Deviations: channels and positions of an image are normalised together (`nn.GroupNorm(1, c)`).
    """

    name: ClassVar[str] = "layer-norm"
    stage: ClassVar[Stage] = Stage.PROJECT  # it never acts
    rewrites: ClassVar[bool] = True

    def __init__(self, affine: bool = default("layer-norm", "affine")) -> None:
        super().__init__()
        check(self.name, {"affine": affine})
        self.affine = affine

    def rewrite(
        self, net: nn.Sequential, generators: Sequence[torch.Generator] | None = None
    ) -> bool:
        trunk = Trunk(net)
        for hidden in trunk.hidden:
            if hidden.norm is None:
                trunk.places[hidden.at].append(norm_after(hidden.layer, self.affine))
        trunk.write()
        return bool(trunk.hidden)

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        require_rewritten(self, units)
