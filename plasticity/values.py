"""Value losses: how a scalar or distribution of returns is coded, fitted and read back.

    codec = make("hl-gauss:low=0,high=500")
    target = codec.encode(returns)                  # [..., k]
    loss, gradient = codec.loss(outputs, target)    # [...], [..., m]; outputs [..., m]
    values = codec.decode(outputs)                  # [...]

Everything is a pure function of tensors of any leading shape (copies first) and any float dtype,
and asks the device nothing. Losses are per element, not averaged, and come with their gradient by
the outputs written out; tests compare it with autograd. A head whose last layer starts at zero
begins in the middle of the support. Changing the support in mid-run invalidates the head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perennial.plasticity.categorical import (
    Loss,
    centres,
    cross_entropy,
    project,
    symexp,
    symlog,
    two_hot,
)
from perennial.plasticity.registry import check
from perennial.plasticity.value_registry import VALUES, check_support, default, parse_spec


class Codec(ABC):
    """One way to fit values.

    Attributes:
        name: in `--value-loss`.
        outputs: m, network outputs per value.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def outputs(self) -> int: ...

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Targets `[..., k]` of scalar values `[...]`."""

    @abstractmethod
    def decode(self, outputs: Tensor) -> Tensor:
        """Values `[...]` that network outputs `[..., m]` stand for."""

    @abstractmethod
    def loss(self, outputs: Tensor, target: Tensor) -> Loss:
        """Loss of outputs `[..., m]` on targets `[..., k]`, and its gradient by the outputs."""

    def backup(self, outputs: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
        """Targets `[..., k]` of `rewards + discounts * next value`.

        outputs: those of the next state `[..., m]`. rewards: `[...]`, less the entropy term where
        there is one. discounts: `[...]`, gamma, or 0 where the episode terminated.
        """
        return self.encode(rewards + discounts * self.decode(outputs))

    def outside(self, values: Tensor) -> Tensor:
        """Which values `[...]` lie beyond the support and are clipped: bool. Log its mean."""
        return torch.zeros_like(values, dtype=torch.bool)

    def smallest(self, outputs: Tensor, dim: int) -> Tensor:
        """Of several critics along axis `dim`, the outputs of the one with the smallest value."""
        axis = dim if dim >= 0 else dim + outputs.ndim
        index = self.decode(outputs).argmin(axis, keepdim=True).unsqueeze(-1)
        return torch.take_along_dim(outputs, index, axis).squeeze(axis)

    def __post_init__(self) -> None:
        given = asdict(self)  # type: ignore[call-overload]  # codecs are dataclasses
        check_support(self.name, check(self.name, given, VALUES))


def make(spec: str) -> Codec:
    """The codec that a spec names: `make("two-hot:low=-5,high=5,bins=101,symlog=false")`."""
    name, parameters = parse_spec(spec)
    kinds: dict[str, type[Codec]] = {kind.name: kind for kind in (MSE, TwoHot, HLGauss, C51)}
    kinds[Quantile.name] = Quantile
    return kinds[name](**parameters)


@dataclass(frozen=True)
class MSE(Codec):
    """The value itself, fitted by `(value - target)^2` (no factor of a half)."""

    name: ClassVar[str] = "mse"

    @property
    def outputs(self) -> int:
        return 1

    def encode(self, values: Tensor) -> Tensor:
        return values.unsqueeze(-1)

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs[..., 0]

    def loss(self, outputs: Tensor, target: Tensor) -> Loss:
        residual = outputs - target
        return Loss(residual.square().sum(-1), 2 * residual)


@dataclass(frozen=True)
class TwoHot(Codec):
    """Cross-entropy to a target on the two nearest of `bins` centres (Imani & White 2018,
    arXiv 1806.04613; Hafner et al. 2023, DreamerV3, arXiv 2301.04104).

    `sum p z` is exact inside the support. The defaults are DreamerV3's first version: 255 centres
    of the symlog of values in [-20, 20], any scale of return without a choice. With symlog the
    value read back is symexp of the mean, which for noisy returns lies below their mean.

    Args:
        low, high: first and last centre, in units of the return, or of its symlog.
        bins: number of centres.
        symlog: whether targets are transformed by `symlog`.
    """

    name: ClassVar[str] = "two-hot"
    low: float = default("two-hot", "low")
    high: float = default("two-hot", "high")
    bins: int = default("two-hot", "bins")
    symlog: bool = default("two-hot", "symlog")

    @property
    def outputs(self) -> int:
        return self.bins

    def encode(self, values: Tensor) -> Tensor:
        coded = symlog(values) if self.symlog else values
        return two_hot((coded - self.low) * ((self.bins - 1) / (self.high - self.low)), self.bins)

    def decode(self, outputs: Tensor) -> Tensor:
        mean = outputs.softmax(-1) @ centres(self.low, self.high, self.bins, outputs)
        return symexp(mean) if self.symlog else mean

    def loss(self, outputs: Tensor, target: Tensor) -> Loss:
        return cross_entropy(outputs, target)

    def outside(self, values: Tensor) -> Tensor:
        coded = symlog(values) if self.symlog else values
        return (coded < self.low) | (coded > self.high)


@dataclass(frozen=True)
class HLGauss(Codec):
    """Cross-entropy to the histogram of a Gaussian around the target (Imani & White 2018,
    arXiv 1806.04613; Farebrother et al. 2024, Stop regressing, arXiv 2403.03950).

    `bins` bins between `bins + 1` edges; a target's mass beyond the support is left out and the
    rest normalised, so that values within about one standard deviation of an end are read back
    nearer the middle. Away from the ends they are exact.

    Args:
        low, high: first and last edge, in units of the return, or of its symlog.
        bins: number of bins.
        width: standard deviation of a target, in bins; 0.75 touches about six bins.
        symlog: whether targets are transformed by `symlog`.
    """

    name: ClassVar[str] = "hl-gauss"
    low: float = default("hl-gauss", "low")
    high: float = default("hl-gauss", "high")
    bins: int = default("hl-gauss", "bins")
    width: float = default("hl-gauss", "width")
    symlog: bool = default("hl-gauss", "symlog")

    @property
    def outputs(self) -> int:
        return self.bins

    def encode(self, values: Tensor) -> Tensor:
        coded = symlog(values) if self.symlog else values
        place = (coded - self.low) * (self.bins / (self.high - self.low))
        edges = torch.arange(self.bins + 1, dtype=values.dtype, device=values.device)
        distance = edges - place.clamp(0, self.bins).unsqueeze(-1)
        below = torch.erf(distance * (1 / (self.width * math.sqrt(2))))
        return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])

    def decode(self, outputs: Tensor) -> Tensor:
        half = (self.high - self.low) / self.bins / 2
        middles = centres(self.low + half, self.high - half, self.bins, outputs)
        mean = outputs.softmax(-1) @ middles
        return symexp(mean) if self.symlog else mean

    def loss(self, outputs: Tensor, target: Tensor) -> Loss:
        return cross_entropy(outputs, target)

    def outside(self, values: Tensor) -> Tensor:
        coded = symlog(values) if self.symlog else values
        return (coded < self.low) | (coded > self.high)


@dataclass(frozen=True)
class C51(Codec):
    """Cross-entropy to a projected distribution of returns over fixed atoms (Bellemare, Dabney &
    Munos 2017, arXiv 1707.06887).

    `backup` moves the next state's atoms by reward and discount, clips them to the support and
    shares each one's mass between its neighbours. A scalar target is a distribution of one atom.
    Deviation: log-softmax in place of the published clamp of probabilities, which kills gradients.

    Args:
        low, high: first and last atom, in units of the return.
        bins: number of atoms.
    """

    name: ClassVar[str] = "c51"
    low: float = default("c51", "low")
    high: float = default("c51", "high")
    bins: int = default("c51", "bins")

    @property
    def outputs(self) -> int:
        return self.bins

    def _place(self, values: Tensor) -> Tensor:
        return (values - self.low) * ((self.bins - 1) / (self.high - self.low))

    def encode(self, values: Tensor) -> Tensor:
        return two_hot(self._place(values), self.bins)

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1) @ centres(self.low, self.high, self.bins, outputs)

    def loss(self, outputs: Tensor, target: Tensor) -> Loss:
        return cross_entropy(outputs, target)

    def backup(self, outputs: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
        atoms = centres(self.low, self.high, self.bins, outputs)
        moved = rewards.unsqueeze(-1) + discounts.unsqueeze(-1) * atoms
        return project(outputs.softmax(-1), self._place(moved))

    def outside(self, values: Tensor) -> Tensor:
        return (values < self.low) | (values > self.high)


@dataclass(frozen=True)
class Quantile(Codec):
    """Quantile regression of the return, unbounded (Dabney et al. 2018, QR-DQN, arXiv 1710.10044).

    For u = target - output at the quantile midpoints tau = (2i + 1) / 2N, the loss is
    `|tau - 1{u < 0}| Huber_kappa(u) / kappa`, summed over outputs, averaged over target samples.
    `backup` gives one target sample per quantile, `encode` of a scalar a single one.

    Args:
        quantiles: N.
        kappa: |u| up to which the loss is quadratic, in units of the return.
    """

    name: ClassVar[str] = "quantile"
    quantiles: int = default("quantile", "quantiles")
    kappa: float = default("quantile", "kappa")

    @property
    def outputs(self) -> int:
        return self.quantiles

    def encode(self, values: Tensor) -> Tensor:
        return values.unsqueeze(-1)

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs.mean(-1)

    def loss(self, outputs: Tensor, target: Tensor) -> Loss:
        count = self.quantiles
        tau = torch.arange(1, 2 * count, 2, dtype=outputs.dtype, device=outputs.device)
        tau = (tau / (2 * count)).unsqueeze(-1)
        u = target.unsqueeze(-2) - outputs.unsqueeze(-1)  # [..., N, samples]
        slope = u.clamp(-self.kappa, self.kappa)  # of Huber
        weight = torch.where(u < 0, 1 - tau, tau) / self.kappa
        huber = slope * (u - 0.5 * slope)
        return Loss((weight * huber).mean(-1).sum(-1), -(weight * slope).mean(-1))

    def backup(self, outputs: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
        return rewards.unsqueeze(-1) + discounts.unsqueeze(-1) * outputs
