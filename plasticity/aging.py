"""Ages of units as the compiled loops take them: how much larger Adam's step is for young units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from perennial.plasticity import kernels
from perennial.plasticity.parts import Part


@dataclass(frozen=True)
class Ages:
    """Of one parameter's units.

    rows, width: of a copy of the parameter as a matrix.
    first, columns: see `kernels.scale_by_age`.
    known: ages, factors and table there.
    """

    rows: int
    width: int
    first: int
    columns: np.ndarray
    known: tuple[np.ndarray, np.ndarray, np.ndarray]


class Aging:
    """Ages of all units on the CPU, and where they stand in the parameters.

    Args:
        parts: parameters with units.
        tables: f by age for each pair of betas, float64.
        birth: of all units, in updates, int64 `[S, units + 1]`.
        updates: int64 `[S]`, read at every use.
        ahead: added to them.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tables: Mapping[tuple[float, float], Tensor],
        birth: Tensor,
        updates: Tensor,
        ahead: int,
    ) -> None:
        births, now = kernels.array(birth), kernels.array(updates)
        arrays = {betas: kernels.array(table) for betas, table in tables.items()}
        ages = {betas: np.zeros(births.shape, np.int32) for betas in tables}
        factors = {betas: np.ones(births.shape) for betas in tables}
        self._lookups = [(births, now, ahead, arrays[b], ages[b], factors[b]) for b in tables]
        self._of: dict[Tensor, Ages] = {}
        for part in parts:
            shape = list(part.parameter.shape)[1 if part.batched else 0 :]
            rows, first = shape[0], -1
            if len(shape) == 1:  # one number per unit: a row of units
                assert part.rows is not None
                rows, columns = 1, np.arange(part.rows.start, part.rows.stop)
            else:
                first = -1 if part.rows is None else part.rows.start
                columns = np.repeat(part.places(), math.prod(shape[2:]))
            known = ages[part.betas], factors[part.betas], arrays[part.betas]
            width = math.prod(shape) // rows
            self._of[part.parameter] = Ages(rows, width, first, columns, known)

    def look_up(self) -> None:
        """Ages as of now, for what `of` gave."""
        for given in self._lookups:
            kernels.look_up(*given)

    def of(self, parameter: Tensor) -> Ages | None:
        """None for parameters without units."""
        return self._of.get(parameter)
