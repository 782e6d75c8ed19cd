"""Initial feature regularisation: features must go on explaining what they did at first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.held import Held
from perennial.plasticity.registry import check, default
from perennial.plasticity.units import WEIGHTED, Layer, Tap, Units

_HEADS = 1  # word of the stream of the heads
_Backward = Callable[[Tensor], tuple[Tensor | None, ...]]


@dataclass(eq=False)
class _Trunk:
    """What lies between a module's input and the input of an output layer, the features.

    Attributes:
        path: of the module in the model.
        module: called with what `tap` recorded, returns the features; or `caught` has them, where
            the output layer is inside it.
        reader: the output layer.
        parameters: name in the module -> parameter of this optimizer.
        frozen: name in the module -> parameter or buffer at `attach`, as the module has it.
    """

    path: str
    module: nn.Module
    tap: Tap
    reader: Layer
    catches: bool
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    catching: bool = False
    caught: Tensor | None = None

    def differentiate(self, x: Tensor) -> tuple[Tensor, _Backward]:
        """Features `[S, B, n]` (S = 1 for ordinary modules) with the weights as they are, and the
        function from their gradient to that of each parameter."""
        if torch.compiler.is_compiling():  # which knows no other way
            features, backward, *_ = vjp(lambda p: self._call(p, x), dict(self.parameters))
            return features, lambda gradient: tuple(backward(gradient)[0].values())
        with torch.enable_grad():
            features = self._call({}, x)
        parameters = list(self.parameters.values())
        return features.detach(), lambda gradient: torch.autograd.grad(
            features, parameters, gradient, allow_unused=True
        )

    def first_features(self, x: Tensor) -> Tensor:
        """The same features with the weights at `attach`."""
        return self._call(self.frozen, x)

    def _call(self, weights: dict[str, Any], x: Tensor) -> Tensor:
        self.catching = self.catches
        output: Any = functional_call(self.module, weights, (x,)) if weights else self.module(x)
        if self.catches:
            output, self.caught, self.catching = self.caught, None, False
        batched = self.reader.batched
        size = self.reader.weight.shape[2]
        if not isinstance(output, Tensor) or output.shape[1 + batched] != size:
            raise ValueError(
                f"infer: what {self.path!r} returns is not what the output layer "
                f"{self.reader.name!r} reads; it cannot act on this model"
            )
        return output.flatten(2) if batched else output.flatten(1).unsqueeze(0)


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
        self._trunks = list(_trunks(units))
        if not self._trunks:
            raise ValueError("infer finds no hidden layer before an output layer")
        self._places: dict[nn.Parameter, int] = {}
        for number, trunk in enumerate(self._trunks):
            skipped = set(trunk.reader.module.parameters()) if trunk.catches else set()
            for name, p in trunk.module.named_parameters():
                if p in owned and p not in skipped:
                    trunk.parameters[name] = p
                    self._places.setdefault(p, len(self._places))
            self._freeze(number, trunk, units)
            self._draw(number, trunk, units)
        self._held = Held(self, list(self._places), units.batched)
        trained = torch.zeros(self.clock.copies, dtype=torch.int64, device=units.device)
        self.register_buffer("trained", trained)

    def _freeze(self, number: int, trunk: _Trunk, units: Units) -> None:
        tensors = dict(trunk.module.named_parameters()) | dict(trunk.module.named_buffers())
        for place, (name, tensor) in enumerate(tensors.items()):
            frozen = tensor.detach().clone()
            buffer = f"frozen_{number}_{place}"
            self.register_buffer(buffer, frozen if units.batched else frozen.unsqueeze(0))
            trunk.frozen[name] = frozen  # shares the buffer's memory

    def _draw(self, number: int, trunk: _Trunk, units: Units) -> None:
        size = trunk.reader.fan_in
        draw = self._stream(_HEADS, number + 1).uniform(self.heads * size)
        draw = ((2 * draw - 1) * math.sqrt(3 / size)).to(units.dtype)
        first = draw.view(-1, self.heads, size)
        self.register_buffer(f"first_heads_{number}", first)
        self.register_buffer(f"heads_{number}", first.clone())
        self.register_buffer(f"heads_mean_{number}", torch.zeros_like(first))
        self.register_buffer(f"heads_square_{number}", torch.zeros_like(first))

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

    def _gradients(self, number: int, trunk: _Trunk) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Of the penalty by the heads, `[S, heads, n]`, and by the trunk's parameters."""
        x = trunk.tap.raw
        if x is None:
            raise ValueError(
                f"infer has seen no training forward of {trunk.path or 'the model'!r}: "
                f"call the module itself, with gradients enabled"
            )
        heads = self.get_buffer(f"heads_{number}")
        target = trunk.first_features(x) @ self.get_buffer(f"first_heads_{number}").mT
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
        readers = [*self.units, *(trunk.tap for trunk in self._trunks)]
        recorded = [reader.raw for reader in readers]
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for reader, raw in zip(readers, recorded, strict=True):
                reader.raw = raw


def _trunks(units: Units) -> Iterator[_Trunk]:
    """The trunk before each output layer; heads that read the same units share one."""
    producers = {site.producer for site in units}
    seen = set()
    for site in units:
        ends = [c.layer for c in site.consumers if c.layer not in producers]
        if not ends or ends[0] in seen:
            continue
        reader = ends[0]
        seen.add(reader)
        before, layers = set[Layer](), {reader}
        while before != layers:  # everything that leads to the reader
            before = set(layers)
            layers |= {s.producer for s in units if any(c.layer in before for c in s.consumers)}
        path = _common([layer.name for layer in layers - {reader}])
        module = units.model.get_submodule(path)
        children = list(module.children())
        whole = isinstance(module, nn.Sequential)
        # A sequence's input is that of its first layer, which written-out passes record too.
        starts = whole and children and isinstance(children[0], WEIGHTED)
        tap = units.watch(children[0] if starts else module)
        inside = any(m is reader.module for m in module.modules())
        if whole and any(child is reader.module for child in children):
            place = next(k for k, child in enumerate(children) if child is reader.module)
            module, inside = nn.Sequential(*children[:place]), False
        trunk = _Trunk(path, module, tap, reader, inside)
        if inside:
            reader.module.register_forward_pre_hook(_Catch(trunk))
        yield trunk


def _common(names: list[str]) -> str:
    """The innermost module that contains all of these layers."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


class _Catch:
    """Keeps the input of an output layer, with its place in autograd, while a trunk is called.

    Copies of a model (target networks) keep the hook; it ignores their layers.
    """

    def __init__(self, trunk: _Trunk | None = None) -> None:
        self.trunk = trunk

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.trunk is not None and self.trunk.catching:
            self.trunk.caught = inputs[0]

    def __deepcopy__(self, memo: dict[int, object]) -> _Catch:
        return _Catch()

    def __reduce__(self) -> tuple[type[_Catch], tuple[()]]:
        return _Catch, ()
