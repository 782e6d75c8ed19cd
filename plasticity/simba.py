"""SimBa and SimbaV2: residual trunks that stay trainable at any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity.architecture import Trunk, require_rewritten
from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.copies import BatchedLinear, Init
from perennial.plasticity.fit import check_equal
from perennial.plasticity.norms import norm_after
from perennial.plasticity.projection import norm_of, project, with_targets
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import Units

_SHIFT = 3.0  # SimbaV2 appends it to the observation, so that its length survives normalisation


class ResidualBlock(nn.Module):
    """x + down(relu(up(norm(x)))) over the last axis."""

    def __init__(self, norm: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.activation, self.down = norm, up, nn.ReLU(), down

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


class UnitSphere(nn.Module):
    """x / |x| over the last axis."""

    normalizes_units = True

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-8)


class Scaler(nn.Module):
    """A learned factor per feature: `weight * start / speed`, with `weight` = `speed` at first.

    Adam moves every weight by about the learning rate: a small `speed` makes the factor move fast.

    Args:
        like: layer whose outputs are scaled.
        start: first factor.
        speed: first value of the parameter.
    """

    def __init__(self, like: nn.Module, start: float, speed: float) -> None:
        super().__init__()
        weight = like.weight
        assert isinstance(weight, Tensor)
        self.batched = isinstance(like, BatchedLinear)
        shape = weight.shape[:2] if self.batched else weight.shape[:1]
        self.factor = start / speed
        self.weight = nn.Parameter(torch.full_like(weight.new_empty(shape), speed))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.factor
        return x * (weight.unsqueeze(1) if self.batched else weight)


class SphereStem(nn.Module):
    """Observation, a constant appended, to a unit vector; linear, scaled, again a unit vector."""

    def __init__(self, linear: nn.Module, scaler: Scaler) -> None:
        super().__init__()
        self.linear, self.scaler = linear, scaler
        self.entry, self.sphere = UnitSphere(), UnitSphere()

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(F.pad(x, (0, 1), value=_SHIFT))
        return self.sphere(self.scaler(self.linear(x)))  # type: ignore[no-any-return]


class SphereBlock(nn.Module):
    """sphere(x + a (sphere(down(relu(scale up(x)))) - x)): a step on the sphere."""

    def __init__(self, up: nn.Module, scaler: Scaler, down: nn.Module, blend: Scaler) -> None:
        super().__init__()
        self.up, self.scaler, self.activation, self.down = up, scaler, nn.ReLU(), down
        self.blend, self.inner, self.outer = blend, UnitSphere(), UnitSphere()

    def forward(self, x: Tensor) -> Tensor:
        step = self.inner(self.down(self.activation(self.scaler(self.up(x)))))
        return self.outer(x + self.blend(step - x))  # type: ignore[no-any-return]


class SimBa(Intervention):
    """Residual trunks with normalised branches, for every linear trunk of the network.

    Version 1: Lee et al. 2025, SimBa (ICLR, arXiv 2410.09754): linear, `blocks` times
    `x + down(relu(up(LN x)))`, LN. Version 2: Lee et al. 2025, SimbaV2 (arXiv 2502.15280): features
    are unit vectors, rows of weights are unit vectors again after each step, scales are learned
    apart, residuals are steps on the sphere of first size 1 / (blocks + 1), no biases.

    The trunk's hidden layers, which must have one width, are replaced; its convolutions and output
    layer stay. Both papers normalise observations by running moments, which is the agent's part
    (`--norm-obs`, `VecNormalize`), and use AdamW (version 1, see `weight-decay`).

    Args:
        version: 1 or 2.
        blocks: residual blocks; 0: one per hidden layer after the first, and at least one.
        expansion: width of a block's hidden layer, times the trunk's.

    Deviations: weights of version 1's blocks are uniform with the variance of the paper's normal
    draw. Version 2 ends at the trunk: the output layer is an ordinary one, and rewards and the
    critic's loss are the agent's. Rows of target networks, which follow as averages and would
    become shorter, are made unit vectors again with those of their network.
    """

    name: ClassVar[str] = "simba"
    stage: ClassVar[Stage] = Stage.PROJECT
    rewrites: ClassVar[bool] = True

    def __init__(
        self,
        version: int = default("simba", "version"),
        blocks: int = default("simba", "blocks"),
        expansion: int = default("simba", "expansion"),
    ) -> None:
        super().__init__()
        check(self.name, {"version": version, "blocks": blocks, "expansion": expansion})
        self.version, self.blocks, self.expansion = version, blocks, expansion
        self._weights: list[list[Tensor]] = []  # of the network, and of each target

    def rewrite(
        self, net: nn.Sequential, generators: Sequence[torch.Generator] | None = None
    ) -> bool:
        trunk = Trunk(net)
        linear = [h for h in trunk.hidden if isinstance(h.layer, nn.Linear | BatchedLinear)]
        if not linear:
            return False
        first, last = linear[0], linear[-1]
        known = {h.at for h in linear} | {h.activation_at for h in linear}
        for at in range(first.at, last.activation_at):
            if at not in known:
                raise ValueError(
                    f"simba replaces plain trunks of linear layers and nonlinearities; this one "
                    f"holds a {type(net[at]).__name__}"
                )
        widths = [_outputs(h.layer) for h in linear]
        check_equal(widths)
        count = self.blocks or max(1, len(linear) - 1)
        draw = _Maker(first.layer, generators)
        build = self._first_version if self.version == 1 else self._second_version
        for at in range(first.at, last.activation_at + 1):
            trunk.places[at] = []
        trunk.places[first.at] = build(draw, _inputs(first.layer), widths[0], count)
        trunk.write()
        return True

    def _first_version(self, draw: _Maker, n_in: int, n: int, count: int) -> list[nn.Module]:
        he = Init("kaiming-uniform", 2**0.5)
        stem = draw(n_in, n, Init("orthogonal"))
        modules: list[nn.Module] = [stem]
        for _ in range(count):
            up, down = draw(n, n * self.expansion, he), draw(n * self.expansion, n, he)
            modules.append(ResidualBlock(norm_after(stem), up, down))
        return [*modules, norm_after(stem)]

    def _second_version(self, draw: _Maker, n_in: int, n: int, count: int) -> list[nn.Module]:
        small = (2 / n) ** 0.5
        inner = small / self.expansion**0.5
        stem = draw(n_in + 1, n, Init("orthogonal"), unit_rows=True)
        modules: list[nn.Module] = [SphereStem(stem, Scaler(stem, small, small))]
        for _ in range(count):
            up = draw(n, n * self.expansion, Init("orthogonal"), unit_rows=True)
            down = draw(n * self.expansion, n, Init("orthogonal"), unit_rows=True)
            blend = Scaler(down, 1 / (count + 1), n**-0.5)
            modules.append(SphereBlock(up, Scaler(up, inner, inner), down, blend))
        return modules

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        require_rewritten(self, units)
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        layers = [
            layer
            for layer in units.layers
            if getattr(layer.module, "unit_rows", False) and layer.module.weight in owned
        ]
        self._weights = with_targets(layers, self.targets)
        for layer in layers:  # whoever initialised the network last may not have known
            norm = norm_of(layer.weight, 2)
            off = ((norm - 1).abs() > 1e-4) & (norm > 0)
            layer.weight.div_(torch.where(off, norm, 1.0).unsqueeze(-1))

    def after_step(self) -> None:
        due = self.clock.due(1) if self._weights else None
        if due is None:
            return
        for weights in self._weights:
            project(weights, torch.ones_like(due, dtype=weights[0].dtype).unsqueeze(-1), due, 2)


class _Maker:
    """Makes linear layers of the kind, device and dtype of a given one."""

    def __init__(self, like: Any, generators: Sequence[torch.Generator] | None) -> None:
        self.like, self.generators = like, generators

    @torch.no_grad()
    def __call__(self, n_in: int, n_out: int, init: Init, unit_rows: bool = False) -> nn.Module:
        like, bias = self.like, not unit_rows
        where = {"dtype": like.weight.dtype, "device": like.weight.device}
        made: Any
        if isinstance(like, BatchedLinear):
            made = BatchedLinear(
                like.copies,
                n_in,
                n_out,
                bias=bias,
                init=init,
                generators=self.generators,
                dtype=like.weight.dtype,
                device=like.weight.device,
            )
        else:
            made = torch.nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias, **where)
            made.weight.copy_(init.draw_weight((n_out, n_in)))
            if bias:
                made.bias.zero_()
            made.init = init
        if unit_rows:
            made.unit_rows = True
            weight = made.weight
            weight.div_(torch.linalg.vector_norm(weight, dim=-1, keepdim=True))
        return made  # type: ignore[no-any-return]


def _inputs(layer: Any) -> int:
    return int(layer.weight.shape[-1])


def _outputs(layer: Any) -> int:
    return int(layer.weight.shape[-2])
