"""Training passes of a plain ReLU CNN on a CPU, without autograd, on one core or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from perennial.agents import convolution_loops as loops
from perennial.agents.aside import Aside
from perennial.agents.convnets import Pixels
from perennial.agents.dueling import Dueling
from perennial.agents.networks import WRITTEN_OUT, Record, gradient_of
from perennial.plasticity import kernels
from perennial.plasticity.copies import BatchedConv2d, BatchedLinear

_LANES = 16  # channels come in multiples of it
Pairs = list[tuple[Tensor, Tensor]]
Arrays = tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]
_ALL = slice(None)
_activate, _differentiate = WRITTEN_OUT[nn.ReLU]


class _Space:
    """Memory of a forward of so many images.

    Attributes:
        threads: that share the work.
        slots: images that `seen` has room for.
        seen: outputs of the convolutions, [S, memory], see `convolution_loops`; without `learns`
            of one image for each thread alone.
        hidden: of each copy and stream the inputs of its linear layers, the first one's, which are
            the same of all streams, are the features.
        outputs: of each copy and stream.
    """

    def __init__(self, net: Convolved, rows: int, learns: bool):
        self.learns, self.rows = learns, rows
        self.threads = min(net.threads, rows)
        self.slots = rows if learns else self.threads
        like = net.weights[0][0][0][0]
        self.seen = like.new_empty(net.copies, self.slots * net.size)
        self.features = like.new_empty(net.copies, rows, net.n_features)
        # The product of a layer with weights beyond the cache is faster with units in rows.
        outs = [
            [[like.new_empty(len(b), rows).t() for _, b in stream] for stream in own]
            for own in net.weights
        ]
        self.hidden = [
            [[features, *stream[:-1]] for stream in own]
            for features, own in zip(self.features, outs, strict=True)
        ]
        self.outputs = [[stream[-1] for stream in own] for own in outs]
        self.arrays = kernels.array(self.seen), kernels.array(self.features)
        self.slope = torch.empty_like(self.features[0])  # gradient by the features of one copy
        self.slope_array = kernels.array(self.slope)

    def half(self, n: int, thread: int) -> slice:
        """Which of n units or features are a thread's."""
        return slice(n * thread // self.threads, n * (thread + 1) // self.threads)


class Convolved:
    """Forward and backward of a CNN [S, B, C, H, W] -> [S, B, n_out], as `WrittenOut` for MLPs.

    The features that the convolutions give go through one stream of linear layers, or two that
    duel. With a second thread each takes half of the images through the convolutions, but half of
    the units of the first linear layer, whose weights are more than a cache holds. One image alone
    stays on one thread: what it waits for is the memory that these weights come from.
    """

    def __init__(self, net: nn.Module, aside: Aside):
        self.net, self.aside = net, aside
        trunk, streams = _anatomy(net)
        self.convolutions = [m for m in trunk if isinstance(m, BatchedConv2d)]
        self.streams = [[m for m in stream if isinstance(m, BatchedLinear)] for stream in streams]
        self.copies = self.convolutions[0].copies
        copies = range(self.copies)
        self.kernels = [_arrays(_tensors(self.convolutions, s)) for s in copies]
        self.weights = [[_tensors(stream, s) for stream in self.streams] for s in copies]
        self.d_kernels: list[Arrays] = []  # where a backward writes, from the first one on
        self.d_weights: list[list[Pairs]] = []
        self.n_features = self.streams[0][0].n_in
        self.threads = 2 if aside.threaded else 1
        self.layers = np.zeros((0, 11), np.int64)
        self.size = 0  # outputs of all convolutions, of one image
        self.spaces: dict[tuple[int, bool], _Space] = {}
        self.space: _Space | None = None  # of the latest forward that will be learned from

    @staticmethod
    def fits(net: nn.Module) -> bool:
        """Whether `net` is pixels, convolutions, flatten, linear layers (dueling or not), a ReLU
        after each but the last, on a CPU and without forward hooks, which only modules run."""
        trunk, streams = _anatomy(net)
        modules = [*trunk, *(m for stream in streams for m in stream)]
        if any(m._forward_hooks for m in net.modules()) or len(trunk) < 4:
            return False
        kinds = {BatchedConv2d: "c", BatchedLinear: "l", nn.Flatten: "f", nn.ReLU: "a", Pixels: "p"}

        def shape(part: Sequence[nn.Module]) -> str:
            return "".join(kinds.get(type(m), "?") for m in part)

        plain = shape(trunk) == "p" + "ca" * ((len(trunk) - 2) // 2) + "f" and all(
            shape(stream) == "la" * (len(stream) // 2) + "l" for stream in streams
        )
        layers = [m for m in modules if isinstance(m, BatchedConv2d | BatchedLinear)]
        regular = all(
            m.n_out % _LANES == 0 and m.padding == 0 for m in layers if isinstance(m, BatchedConv2d)
        )
        return (
            loops.ready
            and plain
            and regular
            and all(m.bias is not None and kernels.ready(m.weight, m.bias) for m in layers)
        )

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        """Output [S, B, n_out] of pixels [S, B, C, H, W]."""
        output = self._run(x, True)
        space = self.space
        if record is not None and space is not None:
            record(self.net, x)
            seen = [x.to(space.seen.dtype).div_(255.0)]
            for row in self.layers[:-1].tolist():
                n_out, height, width, begin = row[3], row[6], row[7], row[10] * space.rows
                own = space.seen[:, begin : begin + space.rows * height * width * n_out]
                own = own.view(self.copies, space.rows, height, width, n_out)
                seen.append(own.movedim(-1, 2))
            for layer, value in zip(self.convolutions, seen, strict=True):
                record(layer, value)
            for j, stream in enumerate(self.streams):
                for k, dense in enumerate(stream):
                    record(dense, torch.stack([own[j][k] for own in space.hidden]))
        return output

    def look(self, x: Tensor) -> Tensor:
        """The same, forgotten at once: the next backward is that of the last forward."""
        return self._run(x, False)

    def _run(self, x: Tensor, learns: bool) -> Tensor:
        x = x.contiguous()
        if not self.size:
            self._measure(x.shape[2:])
        key = x.shape[1], learns
        space = self.spaces.get(key)
        if space is None:
            space = self.spaces[key] = _Space(self, x.shape[1], learns)
        if learns:
            self.space, self.pixels = space, kernels.array(x)
        return torch.stack(
            [self._forward(s, kernels.array(x[s]), space) for s in range(self.copies)]
        )

    def _measure(self, shape: Sequence[int]) -> None:
        """Make the table, and memory that does not depend on the batch, for images of `shape`."""
        _, height, width = shape
        table, weights, turned = [], 0, 0
        for layer in self.convolutions:
            row = [layer.n_in, height, width, layer.n_out, layer.kernel, layer.stride]
            height, width = ((n - layer.kernel) // layer.stride + 1 for n in (height, width))
            table.append([*row, height, width, weights, turned, self.size])
            elements = layer.weight[0].numel()
            weights, turned = weights + elements + layer.n_out, turned + elements
            self.size += height * width * layer.n_out
        self.layers = np.array(table, np.int64)
        dtype = self.kernels[0][0][0].dtype
        self.packed, self.turned = np.empty(weights, dtype), np.empty(turned, dtype)
        self.slopes = np.empty((self.threads, weights), dtype)
        self.spare = np.empty((self.threads, self.size), dtype)
        self.scaled = np.empty((self.threads, int(np.prod(shape))), dtype)

    def _forward(self, copy: int, pixels: np.ndarray, space: _Space) -> Tensor:
        loops.pack(*self.kernels[copy], self.layers, self.packed)
        seen, features = (memory[copy] for memory in space.arrays)
        streams = self.weights[copy], space.hidden[copy], space.outputs[copy]

        def convolve(thread: int) -> None:
            own = space.half(space.rows, thread)
            loops.forward(
                pixels, self.packed, self.layers, own.start, own.stop,
                -1 if space.learns else thread, space.slots, seen, self.scaled[thread], features,
            )  # fmt: skip

        def spread(thread: int) -> None:
            for (first, *_), (x, *rest), out in zip(*streams, strict=True):
                units = space.half(len(first[1]), thread)
                _linear(x, first, rest[0] if rest else out, units, active=bool(rest))

        self._each(convolve, space)
        self._each(spread, space)
        for stream, inputs, out in zip(*streams, strict=True):
            for k in range(1, len(stream)):
                last = k + 1 == len(stream)
                _linear(inputs[k], stream[k], out if last else inputs[k + 1], active=not last)
        outputs = space.outputs[copy]
        return self.net.join(*outputs) if isinstance(self.net, Dueling) else outputs[0]

    def _each(self, work: Callable[[int], None], space: _Space) -> None:
        """Every thread's share of some work."""
        self.aside.each([partial(work, thread) for thread in range(space.threads)])

    def backward(self, gradient: Tensor) -> None:
        """Write the gradients of sum(output * gradient) into every parameter's .grad."""
        assert self.space is not None
        if not self.d_weights:
            copies = range(self.copies)
            self.d_kernels = [_arrays(_gradients(self.convolutions, s)) for s in copies]
            self.d_weights = [[_gradients(stream, s) for stream in self.streams] for s in copies]
        for copy in range(self.copies):
            self._backward(copy, gradient[copy], self.space)
        self.space = None

    def _backward(self, copy: int, gradient: Tensor, space: _Space) -> None:
        loops.turn(self.kernels[copy][0], self.layers, self.turned)
        parted = self.net.part(gradient) if isinstance(self.net, Dueling) else (gradient,)
        streams = list(
            zip(self.weights[copy], self.d_weights[copy], space.hidden[copy], strict=True)
        )
        errors = []  # by what the first linear layers put out before their ReLU
        for (stream, slopes, inputs), error in zip(streams, parted, strict=True):
            for k in range(len(stream) - 1, 0, -1):
                _by_weights(error, inputs[k], slopes[k])
                error = _differentiate(error @ stream[k][0], inputs[k])
            errors.append(error)
        seen, features = (memory[copy] for memory in space.arrays)

        def spread(thread: int) -> None:
            own = space.half(self.n_features, thread)
            target = space.slope[:, own]
            for j, ((first, *_), (slopes, *_), (x, *_)) in enumerate(streams):
                _by_weights(errors[j], x, slopes, space.half(len(slopes[1]), thread))
                if j:
                    target.addmm_(errors[j], first[0][:, own])
                else:
                    torch.mm(errors[j], first[0][:, own], out=target)

        def convolve(thread: int) -> None:
            own = space.half(space.rows, thread)
            loops.backward(
                self.pixels[copy], self.turned, self.layers, own.start, own.stop, space.slots,
                seen, self.scaled[thread], self.spare[thread], features, space.slope_array,
                self.slopes[thread],
            )  # fmt: skip

        self._each(spread, space)
        self._each(convolve, space)
        loops.unpack(self.slopes[: space.threads], self.layers, *self.d_kernels[copy])


def _linear(
    x: Tensor,
    layer: tuple[Tensor, Tensor],
    out: Tensor,
    units: slice = _ALL,
    active: bool = False,
) -> None:
    """What some units of a layer put out for inputs [B, n], into `out` [B, all units]."""
    weight, bias = layer
    own = out.t()[units]
    torch.addmm(bias[units, None], weight[units], x.t(), out=own)
    if active:
        _activate(own)


def _by_weights(
    error: Tensor, x: Tensor, slopes: tuple[Tensor, Tensor], units: slice = _ALL
) -> None:
    """Gradients of some units of a layer by the error [B, all units] of what they put out."""
    torch.mm(error[:, units].t(), x, out=slopes[0][units])
    torch.sum(error[:, units], 0, out=slopes[1][units])


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


def _arrays(pairs: Pairs) -> Arrays:
    """Weights, and biases."""
    weights, biases = zip(*pairs, strict=True)
    return tuple(map(kernels.array, weights)), tuple(map(kernels.array, biases))


def _bias(layer: BatchedConv2d | BatchedLinear) -> Tensor:
    assert layer.bias is not None
    return layer.bias
