"""One memory for all parameters of a network on the CPU: what goes over their elements then is one
loop instead of one per parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(parameters: Sequence[Tensor]) -> Tensor | None:
    """Move the parameters into one memory, one after the other: that memory, `[all elements]`.

    They stay the same objects with the same values; what was a view of the old memory (`detach`,
    `numpy`) is none any longer. Nothing moves where they stand side by side already. None, and
    nothing moves, on other devices and where types differ.
    """
    if not parameters or not _fit(parameters):
        return None
    found = together(parameters)
    if found is not None:
        return found
    with torch.no_grad():
        memory = torch.cat([p.detach().flatten() for p in parameters])
        end = 0
        for p in parameters:
            start, end = end, end + p.numel()
            p.data = memory[start:end].view(p.shape)
    return memory


def together(tensors: Sequence[Tensor]) -> Tensor | None:
    """The memory in which the tensors stand side by side; None where they do not."""
    if not tensors or not _fit(tensors):
        return None
    runs = adjacent(tensors)
    return span(tensors) if len(runs) == 1 else None


def adjacent(*rows: Sequence[Tensor]) -> list[slice]:
    """Runs of places within which, in every row, each tensor begins where the one before ends."""
    runs, start = [], 0
    for k in range(1, len(rows[0]) + 1):
        if k == len(rows[0]) or not all(_follows(row[k - 1], row[k]) for row in rows):
            runs.append(slice(start, k))
            start = k
    return runs


def span(run: Sequence[Tensor]) -> Tensor:
    """The elements of tensors that stand side by side, `[n]`."""
    size = sum(t.numel() for t in run)
    return run[0].detach().as_strided((size,), (1,), run[0].storage_offset())


class SideBySide:
    """Several rows of tensors as few long ones; looked at again only where a tensor has moved."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._spans: list[tuple[Tensor, ...]] = []

    def spans(self, *rows: Sequence[Tensor]) -> list[tuple[Tensor, ...]] | None:
        """Of each run of tensors that stand side by side in every row, their elements `[n]` of each
        row; None where tensors are not contiguous, on other devices, and under a compiler, which
        sees no memory."""
        if torch.compiler.is_compiling():
            return None
        places = [t.data_ptr() for row in rows for t in row]
        if places != self._places:
            if not all(map(_fit, rows)):
                return None
            self._places = places
            self._spans = [tuple(span(row[run]) for row in rows) for run in adjacent(*rows)]
        return self._spans


def _follows(a: Tensor, b: Tensor) -> bool:
    return (
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.storage_offset() + a.numel() == b.storage_offset()
    )


def _fit(parameters: Sequence[Tensor]) -> bool:
    dtype = parameters[0].dtype
    return all(
        p.device.type == "cpu" and p.dtype == dtype and p.is_contiguous() for p in parameters
    )
