"""A step of Adam over one parameter group in compiled loops: what each loop is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perennial.plasticity import kernels
from perennial.plasticity.aging import Aging
from perennial.plasticity.flat import adjacent, span

# Ages, factors and table where no unit has an age.
_NO_AGES = np.zeros((1, 0), np.int32), np.zeros((1, 0)), np.ones(1)
_NO_COLUMNS = np.zeros(0, np.int64)
_STEPS = 4  # place of the step counts among what `kernels.adam` is given
Beside = Callable[[Sequence[Callable[[], Any]], Sequence[Callable[[], Any]]], None]


class Loops:
    """Parameters that stand side by side, with their averages and gradients, are one loop.

    Args:
        params, means, squares: weights and their averages, each `[S, ...]`.
        steps: a row of step counts per parameter, `[P, S]`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        means: Sequence[Tensor],
        squares: Sequence[Tensor],
        steps: Tensor,
    ) -> None:
        self.params, self.means, self.squares, self.steps = params, means, squares, steps
        self.copies = len(steps[0])
        self._grads: list[Tensor | None] = [None] * len(params)
        self._aging: Aging | None = None
        self._runs: list[tuple[Any, ...]] = []
        self._moving: dict[tuple[int, ...], np.ndarray] = {}

    def step(
        self,
        grads: list[Tensor | None],
        options: Mapping[str, Any],
        copies: tuple[int, ...],
        aging: Aging | None,
        beside: Beside | None = None,
    ) -> None:
        """Count and make the step, of these copies and of the parameters that have a gradient.

        beside: runs two lists of calls at the same time: then each makes half of the step.
        """
        calls = self.calls(grads, options, copies, aging)
        if beside is None:
            for call in calls:
                call()
            return
        upper = [partial(call.func, *call.args[:-2], 0, 1) for call in calls]
        lower = [partial(call.func, *call.args[:-2], 1, 2) for call in calls]
        beside(upper, lower)
        for run in self._runs:
            run[_STEPS][:, copies] += 1

    def calls(
        self,
        grads: list[Tensor | None],
        options: Mapping[str, Any],
        copies: tuple[int, ...],
        aging: Aging | None,
    ) -> list[partial[None]]:
        """The step as calls of compiled loops."""
        known = all(a is b for a, b in zip(grads, self._grads, strict=True))
        if not known or aging is not self._aging:
            self._aging = aging
            self.lay_out(grads)
        if copies not in self._moving:
            self._moving[copies] = np.array(copies, np.int64)
        moving, (beta1, beta2) = self._moving[copies], options["betas"]
        lr, eps, decay = float(options["lr"]), options["eps"], options["weight_decay"]
        common = moving, lr, beta1, beta2, eps, decay, 0, 2
        return [partial(kernels.adam, *run, *common) for run in self._runs]  # type: ignore[call-arg]

    def lay_out(self, grads: list[Tensor | None]) -> None:
        """Made anew only when gradients are new tensors, and where ages begin or cease to count."""
        present = [index for index, grad in enumerate(grads) if grad is not None]
        rows = (
            [self.params[index].detach() for index in present],
            [g.detach().contiguous().to(self.params[0].dtype) for g in grads if g is not None],
            [self.means[index] for index in present],
            [self.squares[index] for index in present],
        )
        self._runs = []
        for run in adjacent(*rows):
            memory = [kernels.array(span(row[run])) for row in rows]
            self._runs.append((*memory, *self._places(present[run])))
        # A gradient made contiguous is a copy of this step's values: do not keep it.
        same = all(a is None or a.is_contiguous() for a in grads)
        self._grads = list(grads) if same else [None] * len(grads)

    def _places(self, run: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Steps, parts, columns, ages, factors and table of `kernels.adam` for these parameters."""
        parts, columns, begin, known = [], [_NO_COLUMNS], 0, _NO_AGES
        for index in run:
            shape = self.params[index].shape
            ages = None if self._aging is None else self._aging.of(self.params[index])
            if ages is None:
                parts.append((begin, *_matrix(shape[1:]), -1, -1))
            else:
                at = sum(map(len, columns)) if len(ages.columns) else -1
                columns.append(ages.columns)
                parts.append((begin, ages.rows, ages.width, ages.first, at))
                known = ages.known
            begin += shape.numel()
        steps = kernels.array(self.steps[run[0] : run[-1] + 1])
        return steps, np.array(parts, np.int64), np.concatenate(columns), *known


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a copy of a parameter; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, shape.numel() // rows
