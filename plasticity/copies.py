"""Layers that hold several copies of a network side by side, and how their weights were drawn.

Every tensor carries the copies axis first: weights `[S, out, in]`, biases `[S, out]`, activations
`[S, B, n]`. A copy is one seed (for twin critics: one critic of one seed). Copies never mix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_KINDS = (
    "orthogonal",
    "lecun-uniform",
    "kaiming-uniform",
    "xavier-uniform",
    "torch-default",
    "zeros",
)


@dataclass(frozen=True)
class Init:
    """How a layer was initialised; enough to draw the whole tensor again, or single fresh rows.

    Args:
        kind: one of `INIT_KINDS`. Uniform bounds: lecun `sqrt(3 / fan_in)`, kaiming
            `gain * sqrt(3 / fan_in)`, xavier `gain * sqrt(6 / (fan_in + fan_out))`,
            torch-default `1 / sqrt(fan_in)` (what `nn.Linear` and `nn.Conv2d` do).
        gain: scale of orthogonal, kaiming and xavier (without unit).
        bias: "zeros", or "torch-default" for uniform in `1 / sqrt(fan_in)`.
    """

    kind: str = "torch-default"
    gain: float = 1.0
    bias: str = "zeros"

    def __post_init__(self) -> None:
        if self.kind not in INIT_KINDS:
            raise ValueError(f"unknown init {self.kind!r}; one of {', '.join(INIT_KINDS)}")
        if self.bias not in ("zeros", "torch-default"):
            raise ValueError(f"unknown bias init {self.bias!r}; one of zeros, torch-default")
        if not (math.isfinite(self.gain) and self.gain >= 0):
            raise ValueError(f"gain={self.gain} of an init must be finite and not negative")

    def bound(self, fan_in: int, fan_out: int) -> float:
        """Half-width of the uniform draw of a weight; 0 for zeros and orthogonal."""
        if self.kind == "lecun-uniform":
            return math.sqrt(3 / fan_in)
        if self.kind == "kaiming-uniform":
            return self.gain * math.sqrt(3 / fan_in)
        if self.kind == "xavier-uniform":
            return self.gain * math.sqrt(6 / (fan_in + fan_out))
        if self.kind == "torch-default":
            return 1 / math.sqrt(fan_in)
        return 0.0

    def bias_bound(self, fan_in: int) -> float:
        """Half-width of the uniform draw of a bias."""
        return 1 / math.sqrt(fan_in) if self.bias == "torch-default" else 0.0

    def draw_weight(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """One copy's weight `[out, in, ...]`, float64 on the CPU (so that every dtype and device
        starts from the same numbers)."""
        weight = torch.empty(tuple(shape), dtype=torch.float64)
        if self.kind == "zeros":
            return weight.zero_()
        if self.kind == "orthogonal":
            return nn.init.orthogonal_(weight, self.gain, generator=generator)
        area = math.prod(shape[2:])
        bound = self.bound(shape[1] * area, shape[0] * area)
        return weight.uniform_(-bound, bound, generator=generator)

    def draw_bias(
        self, n_out: int, fan_in: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """One copy's bias `[out]`, float64 on the CPU."""
        bias = torch.zeros(n_out, dtype=torch.float64)
        bound = self.bias_bound(fan_in)
        return bias.uniform_(-bound, bound, generator=generator) if bound else bias


# Weights of one copy beyond which a batched product's gradient, which comes transposed, costs more
# on a CPU than products of each copy: half of the time at 3136 inputs and 512 outputs.
_LARGE = 1 << 18


def _each(bias: Tensor | None, copies: int) -> Sequence[Tensor | None]:
    """The bias of each copy."""
    return [None] * copies if bias is None else bias.unbind()


class _Drawn(nn.Module):
    """Weight and bias of several copies, drawn as `init` says."""

    copies: int
    init: Init
    weight: nn.Parameter
    bias: nn.Parameter | None

    @torch.no_grad()
    def reset_parameters(self, generators: Sequence[torch.Generator] | None = None) -> None:
        """Draw all weights, then biases, copy by copy, each from its own generator."""
        if generators is not None and len(generators) != self.copies:
            raise ValueError(
                f"{len(generators)} generators for {self.copies} copies; give one per copy"
            )
        shape = self.weight.shape[1:]
        for copy in range(self.copies):
            generator = None if generators is None else generators[copy]
            self.weight[copy].copy_(self.init.draw_weight(shape, generator))
            if self.bias is not None:
                fan_in = math.prod(shape[1:])
                self.bias[copy].copy_(self.init.draw_bias(shape[0], fan_in, generator))


class BatchedLinear(_Drawn):
    """`copies` linear layers as one: weight `[S, out, in]`, bias `[S, out]`.

    Args:
        copies: S, the number of copies.
        n_in, n_out: features of one copy.
        bias: whether there is one.
        init: how weights are drawn, now and when a unit is recycled.
        generators: one CPU generator per copy (copy k then starts as it would alone); None draws
            from torch's global generator.

    >>> layer = BatchedLinear(3, 4, 5)
    >>> layer(torch.zeros(3, 7, 4)).shape
    torch.Size([3, 7, 5])
    """

    def __init__(
        self,
        copies: int,
        n_in: int,
        n_out: int,
        *,
        bias: bool = True,
        init: Init | None = None,
        generators: Sequence[torch.Generator] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if min(copies, n_in, n_out) < 1:
            raise ValueError(f"copies={copies}, n_in={n_in}, n_out={n_out} must all be at least 1")
        self.copies, self.n_in, self.n_out = copies, n_in, n_out
        self.init = Init() if init is None else init
        self.weight = nn.Parameter(torch.empty(copies, n_out, n_in, dtype=dtype, device=device))
        self.bias = (
            nn.Parameter(torch.empty(copies, n_out, dtype=dtype, device=device)) if bias else None
        )
        self.reset_parameters(generators)

    def forward(self, x: Tensor) -> Tensor:  # [S, B, in] -> [S, B, out]
        if self.copies == 1:  # one seed is the ordinary case: no batched product
            # Squeezed, not indexed: the gradient of an index is a tensor of zeros and a copy.
            bias = None if self.bias is None else self.bias.squeeze(0)
            return F.linear(x.squeeze(0), self.weight.squeeze(0), bias).unsqueeze(0)
        if x.device.type == "cpu" and self.n_in * self.n_out > _LARGE:
            weights, biases = self.weight.unbind(), _each(self.bias, self.copies)
            return torch.stack(list(map(F.linear, x.unbind(), weights, biases)))
        if self.bias is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"copies={self.copies}, n_in={self.n_in}, n_out={self.n_out}, bias={bias}"


class BatchedConv2d(_Drawn):
    """`copies` convolutions as one: weight `[S, out, in, kh, kw]`, bias `[S, out]`.

    On a GPU all copies are one grouped convolution; on a CPU, where those are slow, one after the
    other.

    Args:
        copies: S, the number of copies.
        n_in, n_out: channels of one copy.
        kernel: side of the square kernel.
        stride, padding: as of `nn.Conv2d`.
        bias: whether there is one.
        init: how weights are drawn, now and when a unit is recycled.
        generators: one CPU generator per copy (copy k then starts as it would alone); None draws
            from torch's global generator.

    >>> layer = BatchedConv2d(3, 4, 5, kernel=3, stride=2)
    >>> layer(torch.zeros(3, 7, 4, 9, 9)).shape
    torch.Size([3, 7, 5, 4, 4])
    """

    def __init__(
        self,
        copies: int,
        n_in: int,
        n_out: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        init: Init | None = None,
        generators: Sequence[torch.Generator] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if min(copies, n_in, n_out, kernel, stride) < 1 or padding < 0:
            raise ValueError(
                f"copies={copies}, n_in={n_in}, n_out={n_out}, kernel={kernel}, stride={stride} "
                f"must all be at least 1, padding={padding} at least 0"
            )
        self.copies, self.n_in, self.n_out = copies, n_in, n_out
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.init = Init() if init is None else init
        shape = (copies, n_out, n_in, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.bias = (
            nn.Parameter(torch.empty(copies, n_out, dtype=dtype, device=device)) if bias else None
        )
        self.reset_parameters(generators)

    def forward(self, x: Tensor) -> Tensor:  # [S, B, in, H, W] -> [S, B, out, H', W']
        if self.copies == 1:
            bias = None if self.bias is None else self.bias.squeeze(0)
            return self._convolve(x.squeeze(0), self.weight.squeeze(0), bias).unsqueeze(0)
        if x.is_cuda:
            return self._grouped(x)
        weights, biases = self.weight.unbind(), _each(self.bias, self.copies)
        parts = [
            self._convolve(part, weight, bias).movedim(1, -1)
            for part, weight, bias in zip(x.unbind(), weights, biases, strict=True)
        ]
        return torch.stack(parts).movedim(-1, 2)  # the channels stay last in memory

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One copy. On a CPU with channels last in memory: measured at the Nature CNN's first
        layer, forward and backward take less than half of the time."""
        if not x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, bias, self.stride, self.padding)

    def _grouped(self, x: Tensor) -> Tensor:
        """One convolution whose groups are the copies, side by side as channels."""
        bias = None if self.bias is None else self.bias.flatten()
        out = F.conv2d(
            x.transpose(0, 1).flatten(1, 2),
            self.weight.flatten(0, 1),
            bias,
            self.stride,
            self.padding,
            groups=self.copies,
        )
        return out.unflatten(1, (self.copies, self.n_out)).transpose(0, 1)

    def extra_repr(self) -> str:
        return (
            f"copies={self.copies}, n_in={self.n_in}, n_out={self.n_out}, kernel={self.kernel}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )
