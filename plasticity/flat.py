"""One memory for all parameters of a network on the CPU: what concerns elements here and there
then is one operation instead of one per parameter."""

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


def together(parameters: Sequence[Tensor]) -> Tensor | None:
    """The memory in which the parameters stand side by side; None where they do not."""
    if not _fit(parameters):
        return None
    first = parameters[0].detach()
    storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
    for p in parameters:
        if p.untyped_storage().data_ptr() != storage or p.storage_offset() != place:
            return None
        place += p.numel()
    start = first.storage_offset()
    return first.as_strided((place - start,), (1,), start)


def _fit(parameters: Sequence[Tensor]) -> bool:
    dtype = parameters[0].dtype
    return all(
        p.device.type == "cpu" and p.dtype == dtype and p.is_contiguous() for p in parameters
    )
