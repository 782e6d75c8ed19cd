"""Loops over elements for the CPU, compiled by numba at first use and kept on disk.

One pass over memory where torch would take several, without the interpreter's lock. `ready` says
whether they can be used; where not (no numba for this Python, other devices, half precision), the
callers have the same in torch operations. All arrays are C-contiguous and of one dtype, float32 or
float64, unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

try:
    import numba
except ImportError:  # pragma: no cover - no wheel for this Python yet
    numba = None  # type: ignore[assignment]
else:
    # NUMBA_DISABLE_JIT=1: loops would run in the interpreter.
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        numba = None  # type: ignore[assignment]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_TYPES = (torch.float32, torch.float64)


def compiled(function: _Function, reorders: bool = False) -> _Function:
    """The same, compiled at its first call for the types it gets; holds no interpreter's lock.

    reorders: sums may be taken in any order, several terms at a time.
    """
    if numba is None:
        return function
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    if reorders:
        options["fastmath"] = {"reassoc"}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder to keep it in: compiled anew by every process
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def ready(*tensors: Tensor) -> bool:
    """Whether these tensors may be given to the functions below, as arrays."""
    return numba is not None and all(
        t.dtype in _TYPES and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def array(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU."""
    found: np.ndarray = tensor.detach().numpy()
    return found


@compiled
def _step_by_age(  # type: ignore[no-untyped-def]
    w, g, m, v, rate, root, new1, keep2, new2, eps, decay, tiny, factors, ages, factor, age
):
    zero = w.dtype.type(0)
    for i in range(w.size):
        slope = g[i] + decay * w[i]
        mean = m[i] + (slope - m[i]) * new1
        mean = zero if abs(mean) < tiny else mean  # this way round, what is no number stays none
        square = v[i] * keep2 + slope * slope * new2
        square = zero if square < tiny else square
        m[i], v[i] = mean, square
        scale = factors[i] if ages[i] < age else factor
        w[i] -= scale * (rate * (mean / (math.sqrt(square) * root + eps)))


@compiled
def adam(
    weight: np.ndarray,
    grad: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    steps: np.ndarray,
    parts: np.ndarray,
    columns: np.ndarray,
    ages: np.ndarray,
    factors: np.ndarray,
    table: np.ndarray,
    copies: np.ndarray,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    low: int,
    high: int,
) -> None:
    """A step of Adam for a run of parameters, in place; where their elements belong to units with
    an age, its size is scaled by f(age) / f(step).

    Args:
        weight, grad, mean, square: memory of parameters that stand side by side, each `[S, rows,
            columns]`.
        steps: `[P, S]`, of each parameter and copy: counted on by one; any float.
        parts: int64 `[P, 5]`: of each parameter where it begins, its rows and columns; place of its
            first row's unit, -1 where rows are no units; where the places of its columns' units
            begin in `columns`, -1 where they are none.
        columns: int64.
        ages, factors, table: see `scale_by_age`.
        copies: int64, which to move.
        decay: coupled weight decay.
        low, high: 0 and 2 for all rows. 0 and 1, or 1 and 2, for one half of each parameter's,
            which does not count the step.

    Averages below the smallest normal number become zero: those of a unit that died would otherwise
    fade through subnormal ones, on which processors are a hundred times slower.
    """
    number = weight.dtype.type
    common = (
        number(1 - beta1),
        number(beta2),
        number(1 - beta2),
        number(eps),
        number(decay),
        number(np.finfo(weight.dtype).tiny),
    )
    last = table.size - 1
    width = parts[:, 2].max()
    factor, age = np.ones(width, weight.dtype), np.full(width, last, np.int32)
    for p in range(parts.shape[0]):
        start, rows, width, first, at = parts[p]
        for c in copies:
            step = float(steps[p, c]) + 1.0
            if high - low == 2:
                steps[p, c] += 1
            rate = number(lr / (1 - beta1**step))
            root = number(1 / math.sqrt(1 - beta2**step))
            oldest = min(int(step), last)
            whole = table[oldest]
            for i in range(width):
                age[i], factor[i] = oldest, 1
                if at >= 0 and ages[c, columns[at + i]] < oldest:
                    age[i] = ages[c, columns[at + i]]
                    factor[i] = factors[c, columns[at + i]] / whole
            for r in range(rows * low // 2, rows * high // 2):
                mine, own = np.int32(oldest), number(1)
                if first >= 0 and ages[c, first + r] < oldest:
                    mine, own = ages[c, first + r], number(factors[c, first + r] / whole)
                begin = start + (c * rows + r) * width
                end = begin + width
                part = slice(begin, end)
                w, g, m, v = weight[part], grad[part], mean[part], square[part]
                _step_by_age(w, g, m, v, rate, root, *common, factor, age, own, mine)


@compiled
def look_up(
    births: np.ndarray,
    updates: np.ndarray,
    ahead: int,
    table: np.ndarray,
    ages: np.ndarray,
    factors: np.ndarray,
) -> None:
    """Ages of units, and f of them.

    Args:
        births: in updates, int64 `[S, units + 1]`; the last stands for features without unit.
        updates: int64 `[S]`; a unit's age is `updates + ahead - births`.
        table: f by age, float64; its last entry serves all higher ages.
        ages: `[S, units + 1]` int32, written to: ages, as far as the table goes.
        factors: the same, float64: f of them.
    """
    last = table.size - 1
    for c in range(births.shape[0]):
        newest = updates[c] + ahead
        for i in range(births.shape[1]):
            # A clock that was set back leaves births ahead of it: those units are newborn.
            age = min(max(newest - births[c, i], 1), last)
            ages[c, i] = age
            factors[c, i] = table[age]


@compiled
def scale_by_age(
    weight: np.ndarray,
    before: np.ndarray,
    steps: np.ndarray,
    first: int,
    columns: np.ndarray,
    ages: np.ndarray,
    factors: np.ndarray,
    table: np.ndarray,
) -> None:
    """What `weight` has moved by since `before`, scaled by f(age) / f(step), element by element.

    Args:
        weight, before: `[S, rows, columns]`.
        steps: T of each copy, `[S]`.
        first: place of the first row's unit among them; -1 where rows are no units.
        columns: place of each column's unit, int64 `[columns]`, or empty. Of a row's and a column's
            unit, the younger counts.
        ages, factors: t and f(t) of all units, from `look_up`.
        table: f by age, float64; its last entry serves all higher ages.
    """
    number = weight.dtype.type
    width = weight.shape[2]
    last = table.size - 1
    factor, age = np.ones(width, weight.dtype), np.full(width, last, np.int32)
    for c in range(weight.shape[0]):
        oldest = min(int(steps[c]), last)
        whole = table[oldest]
        for i in range(columns.size):
            k = columns[i]
            age[i] = ages[c, k]
            factor[i] = factors[c, k] / whole if age[i] < oldest else 1.0
        for r in range(weight.shape[1]):
            mine, own = np.int32(oldest), number(1)
            if first >= 0 and ages[c, first + r] < oldest:
                mine, own = ages[c, first + r], number(factors[c, first + r] / whole)
            w, b = weight[c, r], before[c, r]
            for i in range(width):
                scale = factor[i] if age[i] < mine else own
                # Exact at both ends: a factor of one leaves every bit.
                w[i] = w[i] - (w[i] - b[i]) * (number(1) - scale)


@compiled
def advance_contribution(
    copies: np.ndarray,
    features: np.ndarray,
    outgoing: np.ndarray,
    mean: np.ndarray,
    utility: np.ndarray,
    ages: np.ndarray,
    start: int,
    share: float,
    new: float,
) -> None:
    """Running averages of E[h] and of E[h] times the units' mean outgoing magnitudes, for h >= 0.

    Args:
        copies: int64, whose to advance.
        features: h `[S, B, n]`.
        outgoing: weights of the consumer, `[S, out, n]`.
        mean, utility: `[S, all units]`, of which this site's begin at `start`.
        ages: the same, int64: counted on by one.
        share: what turns the sum of those weights' magnitudes into a mean.
        new: weight of the new value in the averages.
    """
    number = features.dtype.type
    total = np.empty(features.shape[2], features.dtype)
    size = np.empty_like(total)
    rows, part, weight = number(1 / features.shape[1]), number(share), number(new)
    for c in copies:
        total[:] = 0
        size[:] = 0
        for b in range(features.shape[1]):
            h = features[c, b]
            for i in range(total.size):
                total[i] += h[i]
        for r in range(outgoing.shape[1]):
            w = outgoing[c, r]
            for i in range(total.size):
                size[i] += abs(w[i])
        m, u, age = mean[c, start:], utility[c, start:], ages[c, start:]
        for i in range(total.size):
            age[i] += 1
            average = total[i] * rows
            m[i] += (average - m[i]) * weight
            u[i] += (average * (size[i] * part) - u[i]) * weight


@compiled
def lowest(
    score: np.ndarray,
    ages: np.ndarray,
    start: int,
    n: int,
    maturity: int,
    rate: float,
    coins: np.ndarray,
    index: np.ndarray,
    chosen: np.ndarray,
) -> None:
    """Of each copy the units with the lowest scores among those older than `maturity`.

    Args:
        score, ages: `[S, all units]`, of which these n begin at `start`.
        coins: float64 `[S]`: `rate` times the eligible units, plus this, rounded down, are chosen.
        index, chosen: `[S, K]`, int64 and bool, written to: K distinct units, and which of them.
    """
    slots = index.shape[1]
    taken = np.empty(n, np.bool_)
    for c in range(index.shape[0]):
        eligible = 0
        for i in range(n):
            taken[i] = False
            if ages[c, start + i] > maturity:
                eligible += 1
        count = math.floor(rate * eligible + coins[c])
        for k in range(slots):
            best = -1
            for i in range(n):  # the young ones only where no others are left
                if taken[i]:
                    continue
                old = ages[c, start + i] > maturity
                if best < 0:
                    best = i
                    continue
                older = ages[c, start + best] > maturity
                if old != older:
                    best = i if old else best
                elif score[c, start + i] < score[c, start + best]:
                    best = i
            taken[best] = True
            index[c, k] = best
            chosen[c, k] = k < count and ages[c, start + best] > maturity


@compiled
def clear_rows(tensor: np.ndarray, kept: np.ndarray) -> None:
    """Zero the rows of `tensor` `[S, n, m]` where `kept` `[S, n]` is 0."""
    for c in range(kept.shape[0]):
        for r in range(kept.shape[1]):
            if kept[c, r] == 0:
                tensor[c, r] = 0


@compiled
def clear_columns(tensor: np.ndarray, kept: np.ndarray) -> None:
    """Zero `tensor` `[S, rows, n, m]` where `kept` `[S, n]` is 0."""
    for c in range(kept.shape[0]):
        for i in range(kept.shape[1]):
            if kept[c, i] == 0:
                tensor[c, :, i] = 0


@compiled
def approach(tensor: np.ndarray, goal: np.ndarray, share: float) -> None:
    """Move `tensor` `[n]` a share of the way to `goal`."""
    part = tensor.dtype.type(share)
    for i in range(tensor.size):
        tensor[i] += (goal[i] - tensor[i]) * part


@compiled
def pull(grad: np.ndarray, weight: np.ndarray, origin: np.ndarray, strength: float) -> None:
    """Add `strength` times the way from `origin` to `weight`, all `[n]`."""
    part = grad.dtype.type(strength)
    for i in range(grad.size):
        grad[i] += (weight[i] - origin[i]) * part
