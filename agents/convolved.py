"""Training passes of a plain CNN on a CPU, written out: without autograd, on one core or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from perennial.agents.aside import Aside
from perennial.agents.convnets import Pixels
from perennial.agents.networks import _WRITTEN_OUT, Record, _gradient
from perennial.plasticity.copies import BatchedConv2d, BatchedLinear

_LAST = torch.channels_last


@dataclass
class _Part:
    """Some rows of one copy on their way through the network.

    Attributes:
        inputs: of each layer, convolutions' with channels last in memory.
        errors: gradient by what each linear layer put out before its nonlinearity.
        kernels: gradient by weight and bias of each convolution.
    """

    inputs: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    kernels: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Convolved:
    """Forward and backward of a CNN [S, B, C, H, W] -> [S, B, n_out], as `WrittenOut` for MLPs.

    With a second thread each takes half of the rows, and half of the units of linear layers'
    gradients: two threads of one core each wait for one another twice in a backward, where the
    threads inside of operations would at every operation.
    """

    def __init__(self, net: nn.Module, aside: Aside):
        self.net, self.aside = net, aside
        modules = list(net.children())
        self.convolutions = [m for m in modules if isinstance(m, BatchedConv2d)]
        self.linear = [m for m in modules if isinstance(m, BatchedLinear)]
        self.layers: list[BatchedConv2d | BatchedLinear] = [*self.convolutions, *self.linear]
        self.activate, self.differentiate = _WRITTEN_OUT[type(modules[2])]
        self.copies = self.layers[0].copies
        self.weights = [
            [(layer.weight.detach()[s], _bias(layer).detach()[s]) for layer in self.layers]
            for s in range(self.copies)
        ]
        self.gradients = [
            [
                (_gradient(la.weight).detach()[s], _gradient(la.bias).detach()[s])
                for la in self.layers
            ]
            for s in range(self.copies)
        ]
        self.parts: list[list[_Part]] = []  # of each copy, of each half of the rows

    @staticmethod
    def fits(net: nn.Module) -> bool:
        """Whether `net` is pixels, convolutions, flatten, linear layers, one known activation after
        each but the last, on a CPU and without forward hooks, which only modules run."""
        modules = list(net) if isinstance(net, nn.Sequential) else []
        if len(modules) < 6 or any(m._forward_hooks for m in (net, *modules)):
            return False
        if type(modules[0]) is not Pixels or type(modules[2]) not in _WRITTEN_OUT:
            return False
        kinds = {BatchedConv2d: "c", BatchedLinear: "l", nn.Flatten: "f", type(modules[2]): "a"}
        shape = "".join(kinds.get(type(m), "?") for m in modules[1:])
        convolutions, _, linear = shape.partition("f")
        plain = convolutions == "ca" * (len(convolutions) // 2) != ""
        plain = plain and linear == "la" * (len(linear) // 2) + "l"
        layers = [m for m in modules if isinstance(m, BatchedConv2d | BatchedLinear)]
        return plain and all(m.bias is not None and m.weight.is_cpu for m in layers)

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        """Output [S, B, n_out] of pixels [S, B, C, H, W]."""
        parts = self._run(x)
        if record is not None:
            record(self.net, x)
            for k, layer in enumerate(self.layers):
                inputs = [torch.cat([part.inputs[k] for part in halves]) for halves in parts]
                record(layer, torch.stack(inputs) if self.copies > 1 else inputs[0][None])
        self.parts = parts
        return self._outputs(parts)

    def look(self, x: Tensor) -> Tensor:
        """The same, forgotten at once: the next backward is that of the last forward."""
        return self._outputs(self._run(x))

    def _run(self, x: Tensor) -> list[list[_Part]]:
        rows = x.shape[1]
        middle = rows // 2
        cuts = [slice(rows)]
        if self.aside.threaded and rows > 1:
            cuts = [slice(middle), slice(middle, rows)]
        return [
            self.aside.each([_job(self._forward, s, x[s, cut]) for cut in cuts])
            for s in range(self.copies)
        ]

    def _outputs(self, parts: list[list[_Part]]) -> Tensor:
        """What the last layer put out: the entry after the layers' inputs."""
        return torch.stack([torch.cat([half.inputs[-1] for half in halves]) for halves in parts])

    def _forward(self, copy: int, pixels: Tensor) -> _Part:
        part, count = _Part(), len(self.convolutions)
        # To the layout of convolutions while it is bytes that must move.
        x = pixels.contiguous(memory_format=_LAST).to(self.layers[0].weight.dtype).div_(255.0)
        for k, layer in enumerate(self.convolutions):
            part.inputs.append(x)
            weight, bias = self.weights[copy][k]
            x = self.activate(torch.conv2d(x, weight, bias, layer.stride, layer.padding))
        x = x.flatten(1)
        for k, (weight, bias) in enumerate(self.weights[copy][count:], count):
            part.inputs.append(x)
            x = torch.addmm(bias, x, weight.t())
            if k < len(self.layers) - 1:
                self.activate(x)
        part.inputs.append(x)
        return part

    def backward(self, gradient: Tensor) -> None:
        """Write the gradients of sum(output * gradient) into every parameter's .grad."""
        for copy, halves in enumerate(self.parts):
            shares = gradient[copy].split([len(part.inputs[-1]) for part in halves])
            self.aside.each(
                [
                    _job(self._backward, copy, part, share)
                    for part, share in zip(halves, shares, strict=True)
                ]
            )
            units = range(len(halves))
            self.aside.each([_job(self._linear_gradients, copy, half) for half in units])
            for k, found in enumerate(zip(*(part.kernels for part in halves), strict=True)):
                for own, shares in zip(
                    self.gradients[copy][k], zip(*found, strict=True), strict=True
                ):
                    own.copy_(shares[0])
                    for share in shares[1:]:
                        own.add_(share)
        self.parts = []

    def _backward(self, copy: int, part: _Part, gradient: Tensor) -> None:
        """Errors of linear layers and gradients of convolutions, of one part's rows."""
        part.errors = [gradient]
        count = len(self.convolutions)
        for k in range(len(self.layers) - 1, count - 1, -1):
            gradient = gradient @ self.weights[copy][k][0]
            if k > count:
                gradient = self.differentiate(gradient, part.inputs[k])
                part.errors.insert(0, gradient)
        gradient = self.differentiate(gradient, part.inputs[count])
        last = self.convolutions[-1]
        rows, side = len(gradient), self._side(part.inputs[count - 1], last)
        gradient = gradient.view(rows, last.n_out, *side).contiguous(memory_format=_LAST)
        for k in range(count - 1, -1, -1):
            layer, x = self.convolutions[k], part.inputs[k]
            d_input, d_weight, d_bias = torch.ops.aten.convolution_backward(
                gradient, x, self.weights[copy][k][0], [layer.n_out], [layer.stride] * 2,
                [layer.padding] * 2, [1, 1], False, [0, 0], 1, [k > 0, True, True],
            )  # fmt: skip
            part.kernels.insert(0, (d_weight, d_bias))
            if k:
                gradient = self.differentiate(d_input, x)

    @staticmethod
    def _side(x: Tensor, layer: BatchedConv2d) -> Iterator[int]:
        return ((n + 2 * layer.padding - layer.kernel) // layer.stride + 1 for n in x.shape[2:])

    def _linear_gradients(self, copy: int, half: int) -> None:
        """Gradients of one half of each linear layer's units, from all rows."""
        halves = self.parts[copy]
        for j in range(len(self.linear)):
            k = len(self.convolutions) + j
            errors = _joined([part.errors[j] for part in halves])
            inputs = _joined([part.inputs[k] for part in halves])
            own = slice(None)
            if len(halves) > 1:
                middle = errors.shape[1] // 2
                own = slice(0, middle) if half == 0 else slice(middle, errors.shape[1])
            d_weight, d_bias = (gradient[own] for gradient in self.gradients[copy][k])
            torch.mm(errors[:, own].t(), inputs, out=d_weight)
            torch.sum(errors[:, own], 0, out=d_bias)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _job(work: Callable, *arguments: object) -> Callable:  # type: ignore[type-arg]
    return lambda: work(*arguments)


def _bias(layer: BatchedConv2d | BatchedLinear) -> Tensor:
    assert layer.bias is not None
    return layer.bias
