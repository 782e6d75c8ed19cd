"""Nonlinearities that give two features per unit: `crelu` and `fourier`.

A unit's two features are the columns i and i + n of the next layer: one of them always has a slope,
so no unit can be dead. `find_units` sees both columns as one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity.architecture import Trunk, require_rewritten
from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.copies import Init
from perennial.plasticity.fit import check_even
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import BATCHED, CONVOLUTIONS, WEIGHTED, Units


class CReLU(nn.Module):
    """[relu(x), relu(-x)]: twice as many features along `dim` (Shang et al. 2016).

    >>> CReLU()(torch.tensor([3.0, -2.0]))
    tensor([3., 0., 0., 2.])
    """

    nonlinear = nonnegative = True

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.cat([x, -x], self.dim))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class SinCos(nn.Module):
    """[sin(x), cos(x)]: twice as many features along `dim`."""

    nonlinear = True

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.sin(x), torch.cos(x)], self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class ConcatenatedReLU(Intervention):
    """[relu(x), relu(-x)] for every nonlinearity.

    Abbas et al. 2023, Loss of Plasticity in Continual Deep RL (arXiv 2303.07507); Shang et al. 2016
    (arXiv 1603.05201). No unit is dead: one of its halves passes gradient for every x.

    Args:
        width: "halve" the units, so that each layer gives as many features as before; or "keep"
            them, so that the next layer reads twice as many (the paper's).

    Deviations: weights of layers whose size changes are drawn anew as the layer was initialised;
    ordinary layers that do not say how keep their first half of rows.
    """

    name: ClassVar[str] = "crelu"
    stage: ClassVar[Stage] = Stage.PROJECT  # it never acts
    rewrites: ClassVar[bool] = True

    def __init__(self, width: str = default("crelu", "width")) -> None:
        super().__init__()
        check(self.name, {"width": width})
        self.width = width

    def rewrite(
        self, net: nn.Sequential, generators: Sequence[torch.Generator] | None = None
    ) -> bool:
        return _pair(self.name, net, CReLU, self.width == "halve", generators)

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        require_rewritten(self, units)


class FourierFeatures(Intervention):
    """[sin(x), cos(x)] for every nonlinearity: deep Fourier features.

    Lewandowski, Schuurmans & Machado 2025, Plastic Learning with Deep Fourier Features (ICLR,
    arXiv 2410.20634). Wherever x lies one of the two is nearly linear. Large weights mean high
    frequencies: they pair it with a penalty (`l2`, `spectral`).

    Args:
        width: "halve" the units, so that each layer gives as many features as before (the
            paper's); or "keep" them, so that the next layer reads twice as many.

    Deviations: as for `crelu`.
    """

    name: ClassVar[str] = "fourier"
    stage: ClassVar[Stage] = Stage.PROJECT  # it never acts
    rewrites: ClassVar[bool] = True

    def __init__(self, width: str = default("fourier", "width")) -> None:
        super().__init__()
        check(self.name, {"width": width})
        self.width = width

    def rewrite(
        self, net: nn.Sequential, generators: Sequence[torch.Generator] | None = None
    ) -> bool:
        return _pair(self.name, net, SinCos, self.width == "halve", generators)

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        require_rewritten(self, units)


def _pair(
    name: str,
    net: nn.Sequential,
    kind: type[CReLU] | type[SinCos],
    halve: bool,
    generators: Sequence[torch.Generator] | None,
) -> bool:
    """Put `kind` in the place of every nonlinearity and resize the layers."""
    trunk = Trunk(net)
    wider: set[int] = set()
    for hidden in trunk.hidden:  # every complaint before any change
        if hidden.norm is not None and halve:
            raise ValueError(
                f"{name} changes the width of a layer that has a norm; leave the norm out and "
                f"apply {name} and layer-norm together"
            )
        if halve:
            check_even(name, _width(hidden.layer))
        else:
            wider.add(_reader(name, net, hidden.activation_at))
        if getattr(hidden.layer, "groups", 1) > 1:
            raise ValueError(f"{name} does not fit grouped convolutions; use ordinary ones")
    # In the order of the layers: then a copy's weights depend on its generator alone.
    for at, layer in enumerate(net):
        more = 2 if at in wider else 1
        fewer = 2 if halve and any(hidden.at == at for hidden in trunk.hidden) else 1
        if more > 1 or fewer > 1:
            _resize(layer, more, fewer, generators)
    for hidden in trunk.hidden:
        layer = hidden.layer
        lead = 3 if isinstance(layer, BATCHED) else 2
        spatial = layer.weight.ndim - lead if isinstance(layer, CONVOLUTIONS) else 0
        trunk.places[hidden.activation_at] = [kind(-1 - spatial)]
    trunk.write()
    return bool(trunk.hidden)


def _width(layer: Any) -> int:
    """Units of one copy."""
    return int(layer.weight.shape[1 if isinstance(layer, BATCHED) else 0])


def _reader(name: str, net: nn.Sequential, start: int) -> int:
    """Place of the layer that reads the features of a nonlinearity."""
    for at in range(start + 1, len(net)):
        if isinstance(net[at], WEIGHTED):
            return at
        if any(True for _ in net[at].parameters()):
            break
    raise ValueError(
        f"{name}:width=keep doubles features that something outside this nn.Sequential (or a norm) "
        f"reads; take width=halve"
    )


@torch.no_grad()
def _resize(
    layer: Any, more: int, fewer: int, generators: Sequence[torch.Generator] | None
) -> None:
    """A layer with `more` times the inputs and a `fewer`-th of the outputs, in place."""
    weight, bias = layer.weight, layer.bias
    axis = 1 if isinstance(layer, BATCHED) else 0
    shape = list(weight.shape)
    shape[axis], shape[axis + 1] = shape[axis] // fewer, shape[axis + 1] * more
    n_out, n_in = shape[axis], shape[axis + 1]
    if isinstance(layer, BATCHED):
        layer.n_in, layer.n_out = n_in, n_out
    elif isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = n_in, n_out
    else:
        layer.in_channels, layer.out_channels = n_in, n_out
    # Independent draws of the same fan-in: a part of the rows is drawn as they all were.
    layer.weight = nn.Parameter(weight.narrow(axis, 0, n_out).clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.narrow(axis, 0, n_out).clone())
    if more > 1:
        layer.weight = nn.Parameter(weight.new_empty(shape))
    init = getattr(layer, "init", None)
    if isinstance(layer, BATCHED):
        layer.reset_parameters(generators)
    elif isinstance(init, Init):
        layer.weight.copy_(init.draw_weight(shape))
        if layer.bias is not None:
            layer.bias.copy_(init.draw_bias(n_out, layer.weight[0].numel()))
    elif more > 1:
        layer.reset_parameters()
