"""The fastest training passes that a network allows."""

from __future__ import annotations

from torch import nn

from perennial.agents.compiled_mlp import CompiledMLP
from perennial.agents.networks import Autograd, WrittenOut

Passes = Autograd | WrittenOut


def passes(net: nn.Module, learns: bool = True, only: slice | None = None) -> Passes:
    """Passes of `net`; only plain networks can serve some of their copies.

    learns: see `Autograd`; only: the copies to serve, None for all.
    """
    if CompiledMLP.fits(net):
        return CompiledMLP(net, only)  # type: ignore[arg-type]
    if WrittenOut.fits(net):
        return WrittenOut(net, only)  # type: ignore[arg-type]
    assert only is None
    return Autograd(net, learns)
