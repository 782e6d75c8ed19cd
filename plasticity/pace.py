"""How much larger Adam's step is for a young unit: bias correction by age, as a table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LONGEST = 2**22  # steps after which any unit counts as old
_TOLERANCES = {torch.float64: 1e-13}
_TOLERANCE = 2.0**-24  # of float32 and below: a rounding


class Pace:
    """f(t) = sqrt(1 - b2^t) / (1 - b1^t) of one pair of betas: the same bits on any device and for
    any copies.

    f counts as 1 from where on it is 1 to the precision of the weights.

    Attributes:
        horizon: first t from which on f counts as 1.
        falls, rises: whether f does, somewhere.
        table: float64 `[k, horizon + 1]`: f, and where it both falls and rises (k = 3) its falling
            part and its rising part, 1 and 0 at the end; else k = 1.
    """

    def __init__(
        self, betas: tuple[float, float], dtype: torch.dtype, device: torch.device
    ) -> None:
        tolerance = _TOLERANCES.get(dtype, _TOLERANCE)
        slowest = max(betas)
        length = math.log(tolerance / 4) / math.log(slowest) if slowest > 0 else 1
        t = torch.arange(1, math.ceil(min(length, _LONGEST)) + 1, dtype=torch.float64)
        f = (1 - betas[1] ** t).sqrt() / (1 - betas[0] ** t)
        # Ages start at 1; entry 0 serves copies that stand still, which never read a step off it.
        apart = (f - 1).abs().gt(tolerance).nonzero()  # no single stretch: f may cross 1
        f = torch.cat([f[:1], f[: int(apart[-1]) + 1 if len(apart) else 0], f.new_ones(1)])
        self.falls = betas[0] > 0
        self.rises = betas[1] > 0 and betas[0] != betas[1]
        self.horizon = len(f) - 1
        rows = f.unsqueeze(0)
        if self.falls and self.rises:
            rise = -f.diff(append=f[-1:]).clamp(min=0).flip(0).cumsum(0).flip(0)
            rows = torch.stack([f, f - rise, rise])
        self.table, self.dtype = rows.to(device), dtype

    def factors(self, ages: Tensor, steps: Tensor) -> Tensor:
        """The table's rows at the units' ages `[S, total + 1]`, over f(T), for each of n tensors
        at its own T `[n, S or 1]`: `[n, k, S, total + 1]`.

        A tensor that was reset alone may be younger than its unit: then T counts.
        """
        last = steps.to(torch.int64).clamp(max=self.horizon).unsqueeze(-1)
        index = torch.minimum(ages, last)
        f = self.table[0]
        ratio, scale = f[index], f[last]
        if len(self.table) == 1:
            return (ratio / scale).unsqueeze(1).to(self.dtype)
        rise = self.table[2][index] - self.table[2][last]
        parts = torch.stack([ratio, ratio - rise, rise], 1) / scale.unsqueeze(1)
        return parts.to(self.dtype)
