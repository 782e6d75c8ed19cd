"""The fastest training passes that a network allows."""

from __future__ import annotations

from torch import nn

from perennial.agents.compiled_mlp import CompiledMLP
from perennial.agents.networks import Autograd, WrittenOut

Passes = Autograd | WrittenOut


def written_out(net: nn.Module) -> bool:
    """Whether `passes` of a network need no autograd: then threads serve it better by halves than
    by sharing operations."""
    return CompiledMLP.fits(net) or WrittenOut.fits(net)


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
