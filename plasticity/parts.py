"""Which parameters hold units, as rows or as columns, and where those stand in the vector of all.

Used to spread per-unit numbers over parameters (moments.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perennial.plasticity.units import Site, Units

Side = tuple[Tensor | None, Tensor | None]
Sides = list[Side]


@dataclass(eq=False)
class Part:
    """One parameter with rows or columns of units.

    rows: place of the row units in the vector over all sites; None where rows are no units.
    columns: the same for its input features: a slice where they are all units of one site in order,
        else an index per feature (units.total where a feature is no unit).
    """

    parameter: Tensor
    batched: bool
    rows: slice | None
    columns: slice | Tensor | None
    group: int = 0  # of the optimizer
    betas: tuple[float, float] = (0.0, 0.0)  # of that group, under Adam
    before: Tensor | None = None  # memory for the weights before a step

    def places(self) -> np.ndarray:
        """Place of each input feature's unit, int64 `[in]`; empty where columns are no units."""
        if isinstance(self.columns, Tensor):
            found: np.ndarray = self.columns.cpu().numpy()
            return found
        columns = self.columns or slice(0, 0)
        return np.arange(columns.start, columns.stop)

    def sides(self, vectors: Tensor) -> Sides:
        """The rows' and the columns' share of vectors `[k, S, total + 1]`, as they broadcast."""
        ndim = self.parameter.ndim + (0 if self.batched else 1)
        found: Sides = []
        for vector in vectors:
            row = column = None
            if self.rows is not None:
                row = vector[:, self.rows]
                row = row.view(*row.shape, *[1] * (ndim - 2))
            if self.columns is not None:
                column = vector[:, self.columns]
                column = column.view(len(column), 1, -1, *[1] * (ndim - 3))
            if not self.batched:
                row, column = (side if side is None else side[0] for side in (row, column))
            found.append((row, column))
        return found


def parts_of(units: Units) -> list[Part]:
    """Every parameter that holds rows or columns of units, once."""
    parts: dict[Tensor, Part] = {}
    feeds: dict[Tensor, list[tuple[Tensor, slice, int, bool]]] = {}
    for site, span in zip(units, units.spans, strict=True):
        layer = site.producer
        for parameter in (layer.module.weight, layer.module.bias):
            if parameter is not None:
                parts[parameter] = Part(parameter, layer.batched, span, None)
        for parameter in affine(site):
            parts[parameter] = Part(parameter, parameter.ndim == 2, span, None)
        for consumer in site.consumers:
            reader = consumer.layer
            entry = (consumer.columns.table, span, reader.weight.shape[2], reader.batched)
            feeds.setdefault(reader.module.weight, []).append(entry)
    for parameter, entries in feeds.items():
        part = parts.setdefault(parameter, Part(parameter, entries[0][3], None, None))
        part.columns = _columns(entries, units.total)
    return list(parts.values())


def affine(site: Site) -> list[Tensor]:
    """Gains and offsets of the norms on a site's way, one per unit (`[n]`, batched `[S, n]`)."""
    values = [getattr(norm, name, None) for norm in site.norms for name in ("weight", "bias")]
    return [value for value in values if isinstance(value, Tensor)]


def _columns(entries: Sequence[tuple[Tensor, slice, int, bool]], total: int) -> slice | Tensor:
    """Where each input feature's unit stands in the vector over all sites."""
    table, span, features, _ = entries[0]
    place = torch.full((features,), total, device=table.device)
    for table, span, _, _ in entries:
        units = torch.arange(span.start, span.stop, device=table.device)
        place[table] = units.unsqueeze(-1).expand_as(table)
    if len(entries) == 1 and bool(
        (place == torch.arange(features, device=place.device) + span.start).all()
    ):
        return span
    return place
