"""Plasticity: interventions that keep a network learning, and metrics that show when it stops."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perennial.plasticity.adam import BatchedAdam as BatchedAdam
    from perennial.plasticity.copies import BatchedLinear as BatchedLinear
    from perennial.plasticity.copies import Init as Init

# name -> module: importing the package must not import torch (checking a command needs none)
_EXPORTS = {
    "BatchedAdam": "adam",
    "BatchedLinear": "copies",
    "Init": "copies",
}
_MODULES = ("registry",)

__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module = importlib.import_module(f"{__name__}.{_EXPORTS[name]}")
        return getattr(module, name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
