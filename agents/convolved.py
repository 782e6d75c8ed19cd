"""Training passes of a plain CNN on a CPU, written out: without autograd, on one core or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from perennial.agents.aside import Aside
from perennial.agents.convnets import Pixels
from perennial.agents.dueling import Dueling
from perennial.agents.networks import WRITTEN_OUT, Record, gradient_of
from perennial.plasticity.copies import BatchedConv2d, BatchedLinear

_LAST = torch.channels_last
Pairs = list[tuple[Tensor, Tensor]]


@dataclass
class _Part:
    """Some rows of one copy on their way through the network.

    Attributes:
        seen: input of each convolution, channels last in memory.
        hidden: of each stream the inputs of its linear layers, the first one's are the features.
        output: of the network.
        errors: of each stream, gradients by what its layers put out before their nonlinearity.
        kernels: gradients by weight and bias of each convolution.
    """

    seen: list[Tensor]
    hidden: list[list[Tensor]]
    output: Tensor
    errors: list[list[Tensor]] = field(default_factory=list)
    kernels: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Convolved:
    """Forward and backward of a CNN [S, B, C, H, W] -> [S, B, n_out], as `WrittenOut` for MLPs.

    The features that the convolutions give go through one stream of linear layers, or two that
    duel. With a second thread each takes half of the rows, and half of the units of linear layers'
    gradients: they wait for one another twice in a backward, where threads inside of operations
    would at every operation.
    """

    def __init__(self, net: nn.Module, aside: Aside):
        self.net, self.aside = net, aside
        trunk, streams = _anatomy(net)
        self.activate, self.differentiate = WRITTEN_OUT[type(trunk[2])]
        self.convolutions = [m for m in trunk if isinstance(m, BatchedConv2d)]
        self.streams = [[m for m in stream if isinstance(m, BatchedLinear)] for stream in streams]
        self.copies = self.convolutions[0].copies
        copies = range(self.copies)
        self.kernels = [_tensors(self.convolutions, s) for s in copies]
        self.weights = [[_tensors(stream, s) for stream in self.streams] for s in copies]
        self.d_kernels = [_gradients(self.convolutions, s) for s in copies]
        self.d_weights = [[_gradients(stream, s) for stream in self.streams] for s in copies]
        self.parts: list[list[_Part]] = []  # of each copy, of each half of the rows

    @staticmethod
    def fits(net: nn.Module) -> bool:
        """Whether `net` is pixels, convolutions, flatten, linear layers (dueling or not), one known
        activation after each but the last, on a CPU and without forward hooks, which only modules
        run."""
        trunk, streams = _anatomy(net)
        modules = [*trunk, *(m for stream in streams for m in stream)]
        if any(m._forward_hooks for m in net.modules()) or len(trunk) < 4:
            return False
        if type(trunk[0]) is not Pixels or type(trunk[2]) not in WRITTEN_OUT:
            return False
        kinds = {BatchedConv2d: "c", BatchedLinear: "l", nn.Flatten: "f", type(trunk[2]): "a"}

        def shape(part: Sequence[nn.Module]) -> str:
            return "".join(kinds.get(type(m), "?") for m in part)

        plain = shape(trunk[1:]) == "ca" * ((len(trunk) - 2) // 2) + "f" and all(
            shape(stream) == "la" * (len(stream) // 2) + "l" for stream in streams
        )
        layers = [m for m in modules if isinstance(m, BatchedConv2d | BatchedLinear)]
        return plain and all(m.bias is not None and m.weight.is_cpu for m in layers)

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        """Output [S, B, n_out] of pixels [S, B, C, H, W]."""
        self.parts = self._run(x)
        if record is not None:
            record(self.net, x)
            for k, layer in enumerate(self.convolutions):
                record(layer, self._whole(lambda part, k=k: part.seen[k]))  # type: ignore[misc]
            for j, stream in enumerate(self.streams):
                for k, dense in enumerate(stream):
                    record(dense, self._whole(lambda part, j=j, k=k: part.hidden[j][k]))  # type: ignore[misc]
        return self._whole(lambda part: part.output)

    def look(self, x: Tensor) -> Tensor:
        """The same, forgotten at once: the next backward is that of the last forward."""
        outputs = [_joined([half.output for half in halves]) for halves in self._run(x, False)]
        return torch.stack(outputs)

    def _whole(self, of: Callable[[_Part], Tensor]) -> Tensor:
        """[S, B, ...] from the parts."""
        copies = [_joined([of(half) for half in halves]) for halves in self.parts]
        return torch.stack(copies) if len(copies) > 1 else copies[0].unsqueeze(0)

    def _run(self, x: Tensor, learns: bool = True) -> list[list[_Part]]:
        rows = x.shape[1]
        middle = rows // 2
        cuts = [slice(rows)]
        if self.aside.threaded and rows > 1:
            cuts = [slice(middle), slice(middle, rows)]
        return [
            self.aside.each([partial(self._forward, s, x[s, cut], learns) for cut in cuts])
            for s in range(self.copies)
        ]

    def _forward(self, copy: int, pixels: Tensor, learns: bool) -> _Part:
        seen: list[Tensor] = []
        hidden: list[list[Tensor]] = []
        # To the layout of convolutions while it is bytes that must move; only the first one's
        # backward needs it, and the others' forward where there are several images.
        if learns:
            pixels = pixels.contiguous(memory_format=_LAST)
        x = pixels.to(self.kernels[copy][0][0].dtype).div_(255.0)
        for layer, (weight, bias) in zip(self.convolutions, self.kernels[copy], strict=True):
            seen.append(x)
            x = self.activate(torch.conv2d(x, weight, bias, layer.stride, layer.padding))
            if len(x) > 1:
                x = x.contiguous(memory_format=_LAST)
        features, outputs = x.flatten(1), []
        for stream in self.weights[copy]:
            x = features
            inputs = []
            for k, (weight, bias) in enumerate(stream):
                if k:
                    self.activate(x)
                inputs.append(x)
                x = torch.addmm(bias, x, weight.t())
            hidden.append(inputs)
            outputs.append(x)
        output = self.net.join(*outputs) if isinstance(self.net, Dueling) else outputs[0]
        return _Part(seen, hidden, output)

    def backward(self, gradient: Tensor) -> None:
        """Write the gradients of sum(output * gradient) into every parameter's .grad."""
        for copy, halves in enumerate(self.parts):
            shares = gradient[copy].split([len(part.output) for part in halves])
            each = zip(halves, shares, strict=True)
            self.aside.each([partial(self._backward, copy, part, share) for part, share in each])
            self.aside.each([partial(self._dense, copy, half) for half in range(len(halves))])
            for k, own in enumerate(self.d_kernels[copy]):
                for which, target in enumerate(own):
                    target.copy_(halves[0].kernels[k][which])
                    for other in halves[1:]:
                        target.add_(other.kernels[k][which])
        self.parts = []

    def _backward(self, copy: int, part: _Part, gradient: Tensor) -> None:
        """Errors of linear layers and gradients of convolutions, of one part's rows."""
        parted = self.net.part(gradient) if isinstance(self.net, Dueling) else (gradient,)
        back: Tensor | None = None  # to the features
        for stream, inputs, error in zip(self.weights[copy], part.hidden, parted, strict=True):
            errors = [error]
            for k in range(len(stream) - 1, 0, -1):
                errors.insert(0, self.differentiate(errors[0] @ stream[k][0], inputs[k]))
            part.errors.append(errors)
            own = errors[0] @ stream[0][0]
            back = own if back is None else back.add_(own)
        assert back is not None
        features, last = part.hidden[0][0], self.convolutions[-1]
        height, width = (
            (n + 2 * last.padding - last.kernel) // last.stride + 1 for n in part.seen[-1].shape[2:]
        )
        back = self.differentiate(back, features).view(-1, last.n_out, height, width)
        back = back.contiguous(memory_format=_LAST)
        for k in range(len(self.convolutions) - 1, -1, -1):
            layer, x = self.convolutions[k], part.seen[k]
            d_input, d_weight, d_bias = torch.ops.aten.convolution_backward(
                back, x, self.kernels[copy][k][0], [layer.n_out], [layer.stride] * 2,
                [layer.padding] * 2, [1, 1], False, [0, 0], 1, [k > 0, True, True],
            )  # fmt: skip
            part.kernels.insert(0, (d_weight, d_bias))
            if k:
                back = self.differentiate(d_input, x)

    def _dense(self, copy: int, half: int) -> None:
        """Gradients of one half of each linear layer's units, from all rows."""
        halves = self.parts[copy]
        for j, stream in enumerate(self.d_weights[copy]):
            for k, (d_weight, d_bias) in enumerate(stream):
                errors = _joined([part.errors[j][k] for part in halves])
                inputs = _joined([part.hidden[j][k] for part in halves])
                units = slice(None)
                if len(halves) > 1:
                    middle = len(d_bias) // 2
                    units = slice(middle) if half == 0 else slice(middle, None)
                torch.mm(errors[:, units].t(), inputs, out=d_weight[units])
                torch.sum(errors[:, units], 0, out=d_bias[units])


def _anatomy(net: nn.Module) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """Modules up to the features, and streams from there."""
    if isinstance(net, Dueling):
        return list(net.trunk), [list(net.value), list(net.advantage)]
    modules = list(net) if isinstance(net, nn.Sequential) else []
    flat = next((k for k, m in enumerate(modules) if isinstance(m, nn.Flatten)), -1)
    return modules[: flat + 1], [modules[flat + 1 :]]


def _tensors(layers: Sequence[BatchedConv2d | BatchedLinear], copy: int) -> Pairs:
    return [(m.weight.detach()[copy], _bias(m).detach()[copy]) for m in layers]


def _gradients(layers: Sequence[BatchedConv2d | BatchedLinear], copy: int) -> Pairs:
    return [(gradient_of(m.weight)[copy], gradient_of(_bias(m))[copy]) for m in layers]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bias(layer: BatchedConv2d | BatchedLinear) -> Tensor:
    assert layer.bias is not None
    return layer.bias
