"""Weights held at their initial norm: `nap` (with layer norms) and `weight-norm` (without)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity.architecture import Trunk, require_rewritten
from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.fit import HOMOGENEOUS, check_homogeneous
from perennial.plasticity.norms import norm_after
from perennial.plasticity.paired import CReLU
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import Layer, Units

_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, CReLU)


def norm_of(weight: Tensor, axes: int) -> Tensor:
    """Norm over all but the first `axes` axes: 1 of each copy `[S]`, 2 of each unit `[S, n]`."""
    return torch.linalg.vector_norm(weight, dim=tuple(range(axes, weight.ndim)))


def norms_of(weights: Sequence[Tensor], axes: int) -> Tensor:
    """Norms of several weights side by side: `[S, weights]`, or `[S, units]` for 2 axes."""
    return torch.cat([norm_of(w, axes).view(len(w), -1) for w in weights], 1)


def project(weights: Sequence[Tensor], radius: Tensor, due: Tensor, axes: int) -> None:
    """Rescale weights `[S, out, ...]` to norm `radius`, in the copies that are `due` `[S]`.

    radius: as of `norms_of`. What is zero, or was at first, stays as it is.
    """
    norm = norms_of(weights, axes)
    held = (norm * radius > 0) & due.unsqueeze(-1)
    factors = torch.where(held, radius / norm, 1.0)
    sizes = [w.shape[1] if axes == 2 else 1 for w in weights]
    for weight, factor in zip(weights, factors.split(sizes, 1), strict=True):
        weight.mul_(factor.view(len(weight), -1, *[1] * (weight.ndim - 2)))


def with_targets(layers: Sequence[Layer], targets: Sequence[nn.Module]) -> list[list[Tensor]]:
    """The layers' weights, and those of each target network: an average of weights is shorter than
    they are, so a target that follows them would drift below their norm."""
    likes = [
        [Layer(layer.name, layer.key, target.get_submodule(layer.name)) for layer in layers]
        for target in targets
    ]
    return [[layer.weight for layer in group] for group in (layers, *likes)] if layers else []


class NormalizeAndProject(Intervention):
    """Layer norm before every nonlinearity, and each weight matrix at its initial Frobenius norm.

    Lyle et al. 2024, Normalization and Effective Learning Rates in RL (NaP, NeurIPS, arXiv
    2407.01800). A layer that a norm follows gives the same output at every scale of its weights, so
    that the projection changes no prediction; what it changes is the effective learning rate, which
    would fall as weights grow. Agents that relied on that fall want an explicit schedule
    (`--lr-schedule linear`). Layers lose their bias (the norm has offsets). The output layer is
    neither normalised nor projected. Adam's state is left alone. Weights of target networks are
    projected too.

    Args:
        gains: gain g and offset b of the norms: "decay" them towards (1, 0), "project" each layer's
            (g, b) to length sqrt(n) (only with a nonlinearity that passes a scale on), or "fixed":
            none.
        decay: share of their distance to (1, 0) that gains lose at each projection.
        every: steps between projections; 0: never, only the norms.

    Deviations: "decay" is by a share per projection, not by weight decay times learning rate.
    Projected gains of the last hidden layer do rescale the output.
    """

    name: ClassVar[str] = "nap"
    stage: ClassVar[Stage] = Stage.PROJECT
    rewrites: ClassVar[bool] = True

    radius: Tensor

    def __init__(
        self,
        gains: str = default("nap", "gains"),
        decay: float = default("nap", "decay"),
        every: int = default("nap", "every"),
    ) -> None:
        super().__init__()
        check(self.name, {"gains": gains, "decay": decay, "every": every})
        self.gains, self.decay, self.every = gains, decay, every
        self._weights: list[list[Tensor]] = []  # of the network, and of each target
        self._affine: list[tuple[Tensor, Tensor]] = []  # gain and offset `[S, n]`

    def rewrite(
        self, net: nn.Sequential, generators: Sequence[torch.Generator] | None = None
    ) -> bool:
        trunk = Trunk(net)
        for hidden in trunk.hidden:
            if isinstance(hidden.norm, nn.modules.batchnorm._NormBase):
                raise ValueError(
                    f"nap needs norms without memory, and the network has a "
                    f"{type(hidden.norm).__name__}; leave it out"
                )
            if self.gains == "project" and not isinstance(hidden.activation, _HOMOGENEOUS):
                check_homogeneous(type(hidden.activation).__name__, HOMOGENEOUS)
        for hidden in trunk.hidden:
            hidden.layer.bias = None
            hidden.layer.scale_free = True
            if hidden.norm is None:
                norm = norm_after(hidden.layer, affine=self.gains != "fixed")
                trunk.places[hidden.at].append(norm)
        trunk.write()
        return bool(trunk.hidden)

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        require_rewritten(self, units)
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        layers = [
            layer
            for layer in units.layers
            if getattr(layer.module, "scale_free", False) and layer.module.weight in owned
        ]
        self._weights = with_targets(layers, self.targets)
        self._affine = [] if self.gains == "fixed" else list(_affine(units))
        self.register_buffer("radius", _radii(self._weights, 1, units))

    def after_step(self) -> None:
        due = None if self.every == 0 else self.clock.due(self.every)
        if due is None:
            return
        for weights in self._weights:
            project(weights, self.radius, due, 1)
        for gain, offset in self._affine:
            if self.gains == "project":
                squares = gain.square().sum(-1) + offset.square().sum(-1)
                factor = (gain.shape[-1] / squares).sqrt()
                factor = torch.where(due & (squares > 0), factor, 1.0).unsqueeze(-1)
                gain.mul_(factor)
                offset.mul_(factor)
            else:
                share = torch.where(due, self.decay, 0.0).to(gain.dtype).unsqueeze(-1)
                gain.add_(share * (1 - gain))
                offset.mul_(1 - share)


def _radii(weights: Sequence[Sequence[Tensor]], axes: int, units: Units) -> Tensor:
    """Norms of the network's weights, as `norms_of` has them."""
    if weights:
        return norms_of(weights[0], axes)
    return torch.zeros(units.copies, 0, dtype=units.dtype, device=units.device)


def _affine(units: Units) -> list[tuple[Tensor, Tensor]]:
    """Gains and offsets `[S, n]` of the norms after layers that a projection keeps in place."""
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for site in units:
        if not getattr(site.producer.module, "scale_free", False):
            continue
        for norm in site.norms:
            gain, offset = getattr(norm, "weight", None), getattr(norm, "bias", None)
            if isinstance(gain, Tensor) and isinstance(offset, Tensor):
                pair = [t.detach() if t.ndim == 2 else t.detach()[None] for t in (gain, offset)]
                found[norm] = (pair[0], pair[1])
    return list(found.values())


class WeightNorm(Intervention):
    """Each weight matrix is held at its initial Frobenius norm: `W <- W * rho / |W|` after a step.

    Lyle et al. 2024, Disentangling the Causes of Plasticity Loss (arXiv 2402.18762): stops the
    growth of weights; they find that it can slow learning where nothing normalises the features.
    Not the reparametrisation of Salimans & Kingma 2016. Biases and the optimizer's state are left
    alone, weights of target networks projected too.

    Args:
        per: one norm per "layer", or one per "unit" (its incoming weights).
        scope: the layers of "hidden" units, or "all" (the output layer too: it limits how large
            predictions can be).
        scale: rho, times the initial norm.
        every: steps between projections; 0: never.
    """

    name: ClassVar[str] = "weight-norm"
    stage: ClassVar[Stage] = Stage.PROJECT

    radius: Tensor

    def __init__(
        self,
        per: str = default("weight-norm", "per"),
        scope: str = default("weight-norm", "scope"),
        scale: float = default("weight-norm", "scale"),
        every: int = default("weight-norm", "every"),
    ) -> None:
        super().__init__()
        check(self.name, {"per": per, "scope": scope, "scale": scale, "every": every})
        self.per, self.scope, self.scale, self.every = per, scope, scale, every
        self._axes = 2 if per == "unit" else 1
        self._weights: list[list[Tensor]] = []  # of the network, and of each target

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        hidden = {site.producer.name for site in units}
        layers = [
            layer
            for layer in units.layers
            if layer.module.weight in owned and (self.scope == "all" or layer.name in hidden)
        ]
        self._weights = with_targets(layers, self.targets)
        radius = _radii(self._weights, self._axes, units)
        self.register_buffer("radius", radius * self.scale)

    def after_step(self) -> None:
        due = None if self.every == 0 else self.clock.due(self.every)
        if due is None:
            return
        for weights in self._weights:
            project(weights, self.radius, due, self._axes)
