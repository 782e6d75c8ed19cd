"""The part of a model between an input and the features that an output layer reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.utils.hooks import RemovableHandle

from perennial.plasticity.units import WEIGHTED, Layer, Tap, Units

Backward = Callable[[Tensor], tuple[Tensor | None, ...]]


@dataclass(eq=False)
class Trunk:
    """A module to compute features anew, also with other weights.

    Attributes:
        path: of the module in the model.
        module: called with what `tap` recorded.
        hooks: on the module and the reader, until `close`.
        reader: the output layer, whose input are the features.
        inside: whether the reader lies inside the module: what it is given is caught. Otherwise
            the features are what the module returns.
        parameters: name in the module -> parameter, of those that lead to the features.
        frozen: name in the module -> parameter or buffer as it was at `attach`.
    """

    path: str
    module: nn.Module
    tap: Tap
    reader: Layer
    inside: bool
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)
    fits: bool = True  # the reader was given what the module had returned, in the latest forward
    _returned: tuple[int, int] | None = None
    _catching: bool = False
    _caught: Any = None

    def differentiate(self, x: Tensor) -> tuple[Tensor, Backward]:
        """Features `[S, B, n]` (S = 1 for ordinary modules) with the weights as they are, and the
        function from their gradient to that of each parameter."""
        if torch.compiler.is_compiling():  # which knows no other way
            features, backward, *_ = vjp(lambda p: self.features(x, p), dict(self.parameters))
            return features, lambda gradient: tuple(backward(gradient)[0].values())
        with torch.enable_grad():
            features = self.features(x)
        parameters = list(self.parameters.values())
        return features.detach(), lambda gradient: torch.autograd.grad(
            features, parameters, gradient, allow_unused=True
        )

    def features(self, x: Tensor, weights: dict[str, Any] | None = None) -> Tensor:
        """Features `[S, B, n]`, with some weights (name in the module -> tensor) if given."""
        self._catching = self.inside
        output: Any = None
        try:
            inputs = (x, *self.tap.others)
            if weights is None:
                output = self.module(*inputs)
            else:
                output = functional_call(self.module, weights, inputs)
        except _CaughtError:
            pass
        finally:
            self._catching = False
        if self.inside:
            output, self._caught = self._caught, None
        batched = self.reader.batched
        if (
            not isinstance(output, Tensor)
            or output.shape[1 + batched] != self.reader.weight.shape[2]
        ):
            raise self._unfit()
        return output.flatten(2) if batched else output.flatten(1).unsqueeze(0)

    def close(self) -> None:
        """Remove its hooks."""
        for hook in self.hooks:
            hook.remove()

    def check(self) -> None:
        """One line unless the reader was given exactly what the module returned."""
        if not self.fits:
            raise self._unfit()

    def _unfit(self) -> ValueError:
        return ValueError(
            f"infer: what {self.path!r} returns is not what the output layer {self.reader.name!r} "
            f"reads; put what lies between into that module"
        )


def trunks(units: Units) -> Iterator[Trunk]:
    """The trunk before each output layer; output layers that read the same units share one.

    It is the innermost module that contains all layers before the output layer, or the output layer
    too where that module ends with a bare layer, whose nonlinearity must be elsewhere.
    """
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
        if reader.module not in module.modules() and _ends_bare(module):
            path = _common([layer.name for layer in layers])
            module = units.model.get_submodule(path)
        yield _trunk(units, path, module, reader)


def _trunk(units: Units, path: str, module: nn.Module, reader: Layer) -> Trunk:
    children = list(module.children())
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    # A sequence's input is that of its first layer, which written-out passes record too.
    starts = plain and isinstance(children[0], WEIGHTED)
    tap = units.watch(children[0] if starts else module)
    if plain and any(child is reader.module for child in children):
        place = next(k for k, child in enumerate(children) if child is reader.module)
        module = nn.Sequential(*children[:place])
        return _known(Trunk(path, module, tap, reader, inside=False))
    inside = any(m is reader.module for m in module.modules())
    trunk = Trunk(path, module, tap, reader, inside)
    if inside:
        trunk.hooks = [reader.module.register_forward_pre_hook(_Catch(trunk))]
    else:
        trunk.hooks = [
            module.register_forward_hook(_Return(trunk)),
            reader.module.register_forward_pre_hook(_Compare(trunk)),
        ]
    return _known(trunk)


def _known(trunk: Trunk) -> Trunk:
    skipped = set(trunk.reader.module.parameters()) if trunk.inside else set()
    found = trunk.module.named_parameters()
    trunk.parameters = {name: p for name, p in found if p not in skipped}
    return trunk


def _common(names: list[str]) -> str:
    """The innermost module that contains all of these layers."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _ends_bare(module: nn.Module) -> bool:
    """Whether the last thing that a sequence does is a layer without a nonlinearity."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return isinstance(module, WEIGHTED)


class _CaughtError(Exception):
    """Ends a forward when the features are known: what comes after is nobody's business."""


class _Hook:
    """A hook for a trunk. Copies of a model (target networks) keep it without effect."""

    def __init__(self, trunk: Trunk | None = None) -> None:
        self.trunk = trunk

    def __deepcopy__(self, memo: dict[int, object]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return type(self), ()


class _Catch(_Hook):
    """Keeps the input of the output layer, with its place in autograd, while a trunk is called."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.trunk is not None and self.trunk._catching:
            self.trunk._caught = inputs[0]
            if not torch.compiler.is_compiling():
                raise _CaughtError


class _Return(_Hook):
    """Notes where the output of a training forward lies."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.trunk is not None and _watching() and isinstance(output, Tensor):
            self.trunk._returned = output.data_ptr(), output._version


class _Compare(_Hook):
    """Compares it with what the output layer is given."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.trunk is not None and _watching():
            self.trunk.fits = self.trunk._returned == (inputs[0].data_ptr(), inputs[0]._version)


def _watching() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
