"""The elements of few young units, as lists over one memory (flat.py): on a CPU it is cheaper to
hold and correct these than whole tensors, up to a share of all elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from perennial.plasticity.pace import Pace
from perennial.plasticity.parts import Part

_SHARE = 0.15  # of all elements: above, whole tensors are cheaper

Unit = tuple[int, int]  # copy, place in the vector over all sites


class Few:
    """Which elements of `memory` are rows and columns of the young units, and whose age counts.

    An element that belongs to two of them belongs to the younger.

    Args:
        memory: all parameters, `[all elements]`.
        features: of each part, `Part.features()`.
        width: length of the vector over all sites, and one.
        pace: the one pair of betas.
    """

    def __init__(
        self,
        memory: Tensor,
        parts: Sequence[Part],
        features: Sequence[Mapping[int, Sequence[int]]],
        width: int,
        pace: Pace,
    ) -> None:
        self.memory, self.parts, self.features, self.width = memory, parts, features, width
        f = pace.short[0]
        self._f = torch.cat([f, f[-1:].expand(pace.horizon)])  # by age; they go on growing
        first = int(memory.storage_offset())
        self._starts = [int(part.parameter.storage_offset()) - first for part in parts]
        self._anchor = parts[0].parameter, parts[0].parameter.data_ptr()
        self._sizes = [self._size(unit) for unit in range(width)]
        self._elements: dict[Unit, Tensor] = {}
        self._owner = torch.zeros(len(memory), dtype=torch.int64)  # copy * width + unit
        self._claimed: dict[Unit, int] = {}
        self.active = False
        self._index = self._owner[:0]
        self._before = self._after = self._factor = memory[:0]
        self._youngest: list[tuple[int, int, Tensor, Tensor]] = []

    def current(self) -> bool:
        """Whether the parameters still stand where they did."""
        parameter, pointer = self._anchor
        return parameter.data_ptr() == pointer

    def choose(
        self, copies: Sequence[int], units: Sequence[int], births: Sequence[int], birth: Tensor
    ) -> None:
        """List the elements of these units; `active` says whether they are few.

        copies, units, births: of each young unit its copy, its place in the vector over all sites,
            and when it was recycled, in updates; copy by copy.
        birth: of all units, int64 `[S, width]`.
        """
        self.active = 0 < sum(self._sizes[u] for u in units) <= _SHARE * len(self.memory)
        if not self.active:
            return
        young = list(zip(copies, units, strict=True))
        new = [k for k, unit in enumerate(young) if self._claimed.get(unit) != births[k]]
        for k in sorted(new, key=births.__getitem__):  # the younger one's claim comes later
            self._claimed[young[k]] = births[k]
            self._owner.index_fill_(0, self._of(young[k]), copies[k] * self.width + units[k])
        lists = [self._of(unit) for unit in young]
        self._index = torch.cat(lists)
        self._before, self._after, self._factor = self.memory.new_empty(3, len(self._index))
        # Per copy: its youngest unit, and how much older each element's unit is.
        owner = self._owner.index_select(0, self._index)
        self._youngest, end = [], 0
        for copy in sorted(set(copies)):
            start = end
            end += sum(len(x) for x, c in zip(lists, copies, strict=True) if c == copy)
            born = birth.view(-1).index_select(0, owner[start:end])
            latest = max(b for b, c in zip(births, copies, strict=True) if c == copy)
            self._youngest.append((copy, latest, latest - born, self._factor[start:end]))

    def forget(self) -> None:
        """Births were loaded: who owns what is found anew."""
        self._claimed.clear()

    def hold(self) -> None:
        """Keep the elements as they are."""
        torch.index_select(self.memory, 0, self._index, out=self._before)

    def correct(self, updates: Sequence[int]) -> None:
        """Scale what the elements have moved by since, by f of their units' ages now.

        updates: of each copy.
        """
        longest = len(self._f) // 2
        for copy, latest, older, factor in self._youngest:
            # A clock that was set back leaves births ahead of it: those units are newborn.
            age = min(max(updates[copy] - latest, 1), longest)
            torch.index_select(self._f[age:], 0, older, out=factor)
        torch.index_select(self.memory, 0, self._index, out=self._after)
        torch.lerp(self._before, self._after, self._factor, out=self._after)
        self.memory.scatter_(0, self._index, self._after)

    def _size(self, unit: int) -> int:
        """How many elements a unit of any copy has."""
        count = 0
        for part, features in zip(self.parts, self.features, strict=True):
            shape = list(part.parameter.shape)[1 if part.batched else 0 :]
            if part.rows is not None and part.rows.start <= unit < part.rows.stop:
                count += math.prod(shape[1:])
            count += len(features.get(unit, ())) * shape[0] * math.prod(shape[2:])
        return count

    def _of(self, unit: Unit) -> Tensor:
        """All elements of one unit: its rows and its columns in every part."""
        if unit not in self._elements:
            copy, place = unit
            found = []
            for part, start, features in zip(self.parts, self._starts, self.features, strict=True):
                shape = list(part.parameter.shape)
                shape = shape if part.batched else [1, *shape]
                block = start + copy * math.prod(shape[1:])
                fan, area = math.prod(shape[2:]), math.prod(shape[3:])
                if part.rows is not None and part.rows.start <= place < part.rows.stop:
                    row = block + (place - part.rows.start) * fan
                    found.append(torch.arange(row, row + fan))
                for feature in features.get(place, ()):
                    area_at = block + feature * area
                    rows = torch.arange(0, shape[1] * fan, fan).unsqueeze(-1)
                    found.append(torch.add(rows, torch.arange(area_at, area_at + area)).flatten())
            self._elements[unit] = torch.cat(found)
        return self._elements[unit]
