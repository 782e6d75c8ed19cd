"""Methods that change the network itself: applied once, before its optimizer is made.

    rewrite(model, ["layer-norm", "crelu"])       # in place: any model built of nn.Sequential
    optimizer = torch.optim.Adam(model.parameters())
    units = find_units(model, example)
    attach(["layer-norm", "crelu", "cbp"], units, optimizer)

A trunk is an `nn.Sequential` of layers and nonlinearities; what widths it takes and gives stays as
it was, so whatever reads it needs no change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from perennial.plasticity import registry
from perennial.plasticity.base import Intervention
from perennial.plasticity.fit import REWRITERS, check_together
from perennial.plasticity.units import WEIGHTED, Units

M = TypeVar("M", bound=nn.Module)

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
# What may stand between a layer and its nonlinearity without ending the layer.
_BETWEEN = (nn.Identity, nn.modules.dropout._DropoutNd)
_NONLINEAR = (
    nn.ReLU,
    nn.Tanh,
    nn.LeakyReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.PReLU,
    nn.ReLU6,
    nn.SELU,
    nn.CELU,
    nn.Softplus,
    nn.Softsign,
    nn.Mish,
    nn.Hardswish,
    nn.Hardtanh,
)


def rewriters(methods: Sequence[Intervention | str] | Intervention | str) -> list[Intervention]:
    """Those of the methods (or specs) that change the network, in the order in which they do."""
    if isinstance(methods, Intervention | str):
        methods = [methods]
    made = [registry.make(m) if isinstance(m, str) else m for m in methods]
    order = {name: turn for turn, name in enumerate(REWRITERS)}
    return sorted((m for m in made if m.rewrites), key=lambda m: order.get(m.name, len(order)))


def require_rewritten(method: Intervention, units: Units) -> None:
    """One line when a method that changes networks is attached to one that it has not changed."""
    marks = [getattr(module, "rewritten_by", ()) for module in units.model.modules()]
    if not any(method.name in mark for mark in marks):
        raise ValueError(
            f"{method.name} changes the network: call rewrite(model, {method.name!r}) before the "
            f"optimizer and find_units"
        )


def rewrite(
    model: M,
    methods: Sequence[Intervention | str] | Intervention | str,
    *,
    generators: Sequence[torch.Generator] | None = None,
) -> M:
    """Apply every method that changes networks to every trunk of `model`, in place.

    Args:
        model: an `nn.Sequential`, or a module that holds some: SB3 policies, feature extractors,
            our batched networks. Layers outside of an `nn.Sequential` (heads) are left alone.
        methods: specs or interventions; those that change no network are passed over.
        generators: for batched layers that are drawn anew, one CPU generator per copy; None draws
            from torch's global generator.

    Returns:
        The model. Parameters may be new: make the optimizer, and initialise, after.

    Raises:
        ValueError: one line; a method does not fit the model, or two methods each other.
    """
    chosen = rewriters(methods)
    trunks = list(_trunks(model)) if chosen else []
    marks = {mark for net in trunks for mark in getattr(net, "rewritten_by", ())}
    for method in chosen:
        if method.name in marks:
            raise ValueError(f"{method.name} is applied to this network already; once is enough")
    check_together([*sorted(marks), *(method.name for method in chosen)])
    for method in chosen:
        changed = [net for net in trunks if method.rewrite(net, generators)]
        if not changed:
            raise ValueError(
                f"{method.name} finds no nn.Sequential of layers and nonlinearities in "
                f"{type(model).__name__}: build its hidden layers as one"
            )
        for net in changed:
            before: tuple[str, ...] = getattr(net, "rewritten_by", ())
            net.rewritten_by = (*before, method.name)  # type: ignore[assignment]
    return model


@dataclass(eq=False)
class Hidden:
    """One hidden layer of a trunk: the weighted layer, its nonlinearity, a norm between.

    Attributes:
        at, activation_at: their places in the trunk as it was.
    """

    layer: Any  # one of WEIGHTED
    at: int
    activation: nn.Module
    activation_at: int
    norm: nn.Module | None = None


class Trunk:
    """The modules of an `nn.Sequential`, edited place by place and written back.

    Attributes:
        places: what stands at each former place now.
        hidden: layers that a nonlinearity follows, in order.
    """

    def __init__(self, net: nn.Sequential) -> None:
        self.net = net
        self.places: list[list[nn.Module]] = [[module] for module in net]
        self.hidden: list[Hidden] = []
        layer: tuple[nn.Module, int] | None = None
        norm: nn.Module | None = None
        for at, module in enumerate(net):
            if isinstance(module, WEIGHTED):
                layer, norm = (module, at), None
            elif is_norm(module):
                norm = module
            elif is_nonlinear(module) and layer is not None:
                self.hidden.append(Hidden(*layer, module, at, norm))
                layer = None
            elif not isinstance(module, _BETWEEN):
                layer = None

    def write(self) -> None:
        """Let the `nn.Sequential` hold what stands at the places, numbered anew."""
        self.net._modules.clear()
        for module in itertools.chain.from_iterable(self.places):
            self.net.append(module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises units, each row for itself or over the batch."""
    return isinstance(module, NORMS) or bool(getattr(module, "normalizes_units", False))


def is_nonlinear(module: nn.Module) -> bool:
    """Whether a module is a nonlinearity between layers."""
    return isinstance(module, _NONLINEAR) or bool(getattr(module, "nonlinear", False))


def _trunks(model: nn.Module) -> Iterable[nn.Sequential]:
    """Every `nn.Sequential` with layers of its own, once, however many names it has."""
    for module in model.modules():
        if isinstance(module, nn.Sequential) and any(isinstance(m, WEIGHTED) for m in module):
            yield module
