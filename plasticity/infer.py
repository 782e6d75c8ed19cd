"""Initial feature regularisation: features must go on explaining what they did at first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.held import Held
from perennial.plasticity.registry import check, default
from perennial.plasticity.trunk import Trunk, trunks
from perennial.plasticity.units import Site, Tap, Units

_HEADS = 1  # word of the stream of the heads


class InFeR(Intervention):
    """Lyle, Rowland & Dabney, Understanding and preventing capacity loss in reinforcement learning,
    ICLR 2022 (arXiv 2204.09560).

    Heads g_i on the features phi of the last hidden layer of every network: the gradient of
    `strength * mean over rows of sum over i of (g_i(phi(x)) - scale * g_i0(phi_0(x)))^2` joins
    that of the loss, x the minibatch. phi_0 and g_i0 are the network and the heads at `attach`.

    The heads start as g_i0, drawn lecun-uniform without biases, and learn by Adam at the learning
    rate of the optimizer's first group. They are this method's state, not the model's parameters.

    Args:
        strength: of the sum over heads. The paper's implementers take 0.05 of the mean over ten.
        heads: on each network; 10 in the paper.
        scale: beta; 100 in the paper. With 1 the loss starts at zero.
        every: steps of the optimizer between computations, which cost a training step and more.
            Between them the last gradient is added; the heads take one step of `every` learning
            rates at each. 1 is exact.

    Deviations: the network is evaluated in evaluation mode. The gradient is not clipped with that
    of the loss where the loop clips before the step.

    Raises:
        ValueError: the features cannot be computed from the input of one module; one line.
    """

    name: ClassVar[str] = "infer"
    stage: ClassVar[Stage] = Stage.DECAY
    observes: ClassVar[bool] = True

    trained: Tensor

    def __init__(
        self,
        strength: float = default("infer", "strength"),
        heads: int = default("infer", "heads"),
        scale: float = default("infer", "scale"),
        every: int = default("infer", "every"),
    ) -> None:
        super().__init__()
        given = {"strength": strength, "heads": heads, "scale": scale, "every": every}
        check(self.name, given)
        self.strength, self.heads, self.scale, self.every = strength, heads, scale, every

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        self._trunks = list(trunks(units))
        if not self._trunks:
            raise ValueError("infer finds no hidden layer before an output layer")
        self._places: dict[nn.Parameter, int] = {}
        for number, trunk in enumerate(self._trunks):
            trunk.parameters = {name: p for name, p in trunk.parameters.items() if p in owned}
            for p in trunk.parameters.values():
                self._places.setdefault(p, len(self._places))
            self._freeze(number, trunk, units)
            self._draw(number, trunk, units)
        self._held = Held(self, list(self._places), units.batched)
        trained = torch.zeros(self.clock.copies, dtype=torch.int64, device=units.device)
        self.register_buffer("trained", trained)

    def _freeze(self, number: int, trunk: Trunk, units: Units) -> None:
        """Keep the trunk's weights and buffers as they are now."""
        tensors = dict(trunk.module.named_parameters()) | dict(trunk.module.named_buffers())
        for place, (name, tensor) in enumerate(tensors.items()):
            frozen = tensor.detach().clone()
            buffer = f"frozen_{number}_{place}"
            self.register_buffer(buffer, frozen if units.batched else frozen.unsqueeze(0))
            trunk.frozen[name] = frozen  # shares the buffer's memory

    def _draw(self, number: int, trunk: Trunk, units: Units) -> None:
        size = trunk.reader.fan_in
        draw = self._stream(_HEADS, number + 1).uniform(self.heads * size)
        draw = ((2 * draw - 1) * math.sqrt(3 / size)).to(units.dtype)
        first = draw.view(-1, self.heads, size)
        self.register_buffer(f"first_heads_{number}", first)
        self.register_buffer(f"heads_{number}", first.clone())
        self.register_buffer(f"heads_mean_{number}", torch.zeros_like(first))
        self.register_buffer(f"heads_square_{number}", torch.zeros_like(first))

    def _detached(self) -> None:
        for trunk in self._trunks:
            trunk.close()
            self.units.forget(trunk.tap)

    def before_step(self) -> None:
        if self.strength == 0:
            return
        due = self.clock.due(self.every)
        if due is not None:
            self._compute(due)
        self._held.add()

    def _compute(self, due: Tensor) -> None:
        """Gradients of the penalty: into the pulls, and one step of the heads."""
        pulls: list[Tensor | None] = [None] * len(self._places)
        gradients = []
        with self._aside():
            for number, trunk in enumerate(self._trunks):
                d_heads, d_parameters = self._gradients(number, trunk)
                gradients.append(d_heads)
                for p, pull in zip(trunk.parameters.values(), d_parameters, strict=True):
                    place = self._places[p]
                    before = pulls[place]
                    if pull is not None:
                        pulls[place] = pull if before is None else before + pull
        held = self._held.pulls
        found = [
            torch.zeros_like(old) if new is None else new.view(old.shape)
            for new, old in zip(pulls, held, strict=True)
        ]
        self._held.replace(found, due)
        self.trained.add_(due)
        for number, gradient in enumerate(gradients):
            self._teach(number, gradient, due)

    def _gradients(self, number: int, trunk: Trunk) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Of the penalty by the heads, `[S, heads, n]`, and by the trunk's parameters."""
        x = trunk.tap.raw
        if x is None:
            raise ValueError(
                f"infer has seen no training forward of {trunk.path or 'the model'!r}: "
                f"call the module itself, with gradients enabled"
            )
        trunk.check()
        heads = self.get_buffer(f"heads_{number}")
        target = trunk.features(x, trunk.frozen) @ self.get_buffer(f"first_heads_{number}").mT
        features, backward = trunk.differentiate(x)
        error = features @ heads.mT - self.scale * target  # [S, B, heads]
        error.mul_(2 * self.strength / error.shape[1])
        pulls = backward(error @ heads)
        return error.mT @ features, pulls

    def _teach(self, number: int, gradient: Tensor, due: Tensor) -> None:
        """One step of Adam for the heads of the copies that are due."""
        group = self._optimizer.param_groups[0]
        beta1, beta2 = group.get("betas", (0.9, 0.999))
        names = (f"heads_{number}", f"heads_mean_{number}", f"heads_square_{number}")
        heads, mean, square = (self.get_buffer(name) for name in names)
        steps = self.trained.clamp(min=1).double().view(-1, 1, 1)
        rate = group["lr"] * self.every / (1 - beta1**steps)
        new_mean = torch.lerp(mean, gradient, 1 - beta1)
        new_square = torch.lerp(square, gradient * gradient, 1 - beta2)
        size = (new_square / (1 - beta2**steps)).sqrt() + group.get("eps", 1e-8)
        new_heads = (heads - rate * new_mean / size).to(heads.dtype)
        for old, new in ((heads, new_heads), (mean, new_mean), (square, new_square)):
            old.copy_(torch.where(due.view(-1, 1, 1), new, old))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Forwards in evaluation mode that leave modes and recorded activations as they were."""
        modules = [module for trunk in self._trunks for module in trunk.module.modules()]
        modes = [module.training for module in modules]
        readers: list[Site | Tap] = [*self.units, *(trunk.tap for trunk in self._trunks)]
        recorded = [(reader.raw, getattr(reader, "others", ())) for reader in readers]
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for reader, (raw, others) in zip(readers, recorded, strict=True):
                reader.raw = raw
                if isinstance(reader, Tap):
                    reader.others = others
