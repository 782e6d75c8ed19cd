"""Scale of what a network regresses on: PopArt for targets, return scaling for rewards.

Both keep running statistics per copy as float64 buffers `[S]` (S = 1 for ordinary networks), so
that state dicts carry them, and ask the device nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity.copies import BatchedLinear

_SB3_COUNT = 1e-4  # weight of the variance of 1 that the statistics start from
# Power of k by which an optimizer's averages grow where gradients become k times as large.
_POWER = {
    "exp_avg": 1, "momentum_buffer": 1, "grad_avg": 1, "exp_inf": 1,
    "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2,
}  # fmt: skip


class PopArt(nn.Module):
    """Targets with mean 0 and deviation 1, and heads that preserve their outputs meanwhile.

    van Hasselt, Guez, Hessel, Mnih & Silver 2016 (arXiv 1602.07714); Hessel et al. 2019 (arXiv
    1809.04474). Running averages of targets y and y^2 give mu and sigma; the network is trained on
    `(y - mu) / sigma`; whenever they move, each head's last layer is rewritten such that
    `sigma * output + mu` stays as it was: `w *= sigma / sigma'`, `b = (sigma b + mu - mu') /
    sigma'`. The averages start at mu = 0, sigma = 1 and are not bias-corrected.

    Args:
        copies: S.
        rate: weight of a batch in the running averages.
        low, high: bounds of sigma, in units of the target.

    Attributes:
        mean, square: averages of y and y^2, `[S]`.
    """

    mean: Tensor
    square: Tensor

    def __init__(
        self, copies: int = 1, rate: float = 3e-4, low: float = 1e-4, high: float = 1e6
    ) -> None:
        super().__init__()
        if copies < 1 or not 0 <= rate <= 1 or not 0 < low <= high:
            raise ValueError(
                f"PopArt: copies={copies} must be >= 1, rate={rate} in [0, 1], "
                f"and 0 < low={low} <= high={high}"
            )
        self.rate, self.low, self.high = rate, low, high
        self.register_buffer("mean", torch.zeros(copies, dtype=torch.float64))
        self.register_buffer("square", torch.ones(copies, dtype=torch.float64))

    @property
    def sigma(self) -> Tensor:
        """Deviation of the targets, `[S]`."""
        variance = self.square - self.mean.square()
        return variance.clamp(min=0).sqrt().clamp(self.low, self.high)

    def normalize(self, values: Tensor) -> Tensor:
        """`(values - mu) / sigma` of `[S, ...]`."""
        mean, sigma = (_lead(x, values) for x in (self.mean, self.sigma))
        return ((values - mean) / sigma).to(values.dtype)

    def denormalize(self, outputs: Tensor) -> Tensor:
        """`sigma * outputs + mu` of `[S, ...]`."""
        mean, sigma = (_lead(x, outputs) for x in (self.mean, self.sigma))
        return (sigma * outputs + mean).to(outputs.dtype)

    @torch.no_grad()
    def update(
        self,
        targets: Tensor,
        heads: Sequence[nn.Linear | BatchedLinear],
        optimizer: Optimizer | None = None,
        active: Tensor | None = None,
    ) -> None:
        """Take targets `[S, ...]` into the averages and rewrite the heads.

        Args:
            targets: of this batch, unnormalised.
            heads: last layers whose outputs are normalised values: all critics', and the target
                networks' too.
            optimizer: whose averages of the heads' gradients follow: a residual in units of sigma'
                is sigma / sigma' as large, and so is its gradient.
            active: bool `[S]`, copies to update; None for all.
        """
        rows = targets.reshape(len(self.mean), -1).double()
        mean, sigma = self.mean.clone(), self.sigma
        new_mean = torch.lerp(mean, rows.mean(-1), self.rate)
        new_square = torch.lerp(self.square, rows.square().mean(-1), self.rate)
        if active is not None:
            new_mean = torch.where(active, new_mean, mean)
            new_square = torch.where(active, new_square, self.square)
        self.mean.copy_(new_mean)
        self.square.copy_(new_square)
        new_sigma = self.sigma
        ratio, shift = sigma / new_sigma, (mean - new_mean) / new_sigma
        for head in heads:
            if head.bias is None:
                raise ValueError("PopArt moves the mean through the head's bias: give it one")
            for parameter, offset in ((head.weight, None), (head.bias, shift)):
                _rescale(parameter.detach(), head, ratio, offset)
                state = {} if optimizer is None else optimizer.state.get(parameter, {})
                for name, value in state.items():
                    if name == "momentum_buffer" and "square_avg" in state:
                        continue  # RMSprop's is of gradients over their root mean square
                    if name in _POWER and isinstance(value, Tensor):
                        _rescale(value, head, ratio ** _POWER[name], None)


def _lead(x: Tensor, like: Tensor) -> Tensor:
    """Per-copy numbers `[S]` as they broadcast to `like` `[S, ...]`."""
    return x.view(-1, *[1] * (like.ndim - 1))


def _rescale(
    tensor: Tensor, head: nn.Linear | BatchedLinear, factor: Tensor, offset: Tensor | None
) -> None:
    """`tensor * factor + offset` per copy, in place."""
    view = tensor if isinstance(head, BatchedLinear) else tensor.unsqueeze(0)
    moved = view * _lead(factor, view)
    view.copy_(moved if offset is None else moved + _lead(offset, view))


class ReturnScale(nn.Module):
    """Rewards over the running deviation of the discounted return, without taking off a mean.

    `G <- gamma G + r` per lane, from 0 after an episode's end; rewards are divided by
    `sqrt(Var(G) + eps)` and clipped. By default as `VecNormalize` of Stable-Baselines3 does. Keep
    raw rewards in a replay buffer and scale what is sampled; log `divisor`.

    Args:
        copies, lanes: S and E.
        gamma: discount.
        window: env steps that the statistics remember. The default, all, reacts ever more slowly
            where tasks change.
        peak: divide by at least `max |G| / peak`, so that scaled returns stay within it (SimbaV2,
            Lee et al. 2025, arXiv 2502.15280: 5); None for no such bound.
        clip: bound of scaled rewards.

    Attributes:
        discounted: G `[S, E]`.
        mean, var, count: of G, `[S]`.
        largest: max |G| so far, `[S]`.
    """

    discounted: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    largest: Tensor

    def __init__(
        self,
        copies: int = 1,
        lanes: int = 1,
        *,
        gamma: float = 0.99,
        window: float = math.inf,
        peak: float | None = None,
        clip: float = 10.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if min(copies, lanes) < 1 or not 0 <= gamma <= 1 or not window > 0:
            raise ValueError(
                f"ReturnScale: copies={copies} and lanes={lanes} must be >= 1, gamma={gamma} in "
                f"[0, 1], window={window} > 0"
            )
        if peak is not None and not peak > 0:
            raise ValueError(f"ReturnScale: peak={peak} must be > 0, or None for no bound")
        self.gamma, self.window, self.peak, self.clip, self.eps = gamma, window, peak, clip, eps
        self.register_buffer("discounted", torch.zeros(copies, lanes, dtype=torch.float64))
        for name in ("mean", "var", "count", "largest"):
            self.register_buffer(name, torch.zeros(copies, dtype=torch.float64))
        self.restart()

    @torch.no_grad()
    def update(self, rewards: Tensor, ends: Tensor) -> None:
        """One step of every lane: rewards `[S, E]`, whether the episode ended with it `[S, E]`."""
        returns = self.discounted * self.gamma + rewards
        lanes = returns.shape[-1]
        total = self.count + lanes
        delta = returns.mean(-1) - self.mean
        spread = self.var * self.count + returns.var(-1, correction=0) * lanes
        self.var.copy_((spread + delta.square() * self.count * lanes / total) / total)
        self.mean.add_(delta * lanes / total)
        self.count.copy_(total.clamp(max=self.window))
        self.largest.copy_(torch.maximum(self.largest, returns.abs().amax(-1)))
        self.discounted.copy_(torch.where(ends, 0.0, returns))

    @property
    def divisor(self) -> Tensor:
        """What rewards are divided by, `[S]`."""
        deviation = (self.var + self.eps).sqrt()
        return deviation if self.peak is None else deviation.maximum(self.largest / self.peak)

    def scale(self, rewards: Tensor) -> Tensor:
        """Scaled rewards `[S, ...]`."""
        scaled = (rewards / _lead(self.divisor, rewards)).clamp(-self.clip, self.clip)
        return scaled.to(rewards.dtype)

    @torch.no_grad()
    def restart(self, copies: Tensor | None = None) -> None:
        """Forget the statistics (a change of task); returns under way go on. copies: bool `[S]`."""
        start = (("mean", 0.0), ("var", 1.0), ("count", _SB3_COUNT), ("largest", 0.0))
        for name, value in start:
            buffer = getattr(self, name)
            buffer.copy_(
                torch.full_like(buffer, value)
                if copies is None
                else torch.where(copies, value, buffer)
            )
