"""Passes of a ReLU network, with layer norms or without, in compiled loops around the BLAS: a whole
pass of all copies is one call, which holds no lock of the interpreter.

What a pass costs beside its matrix products then is little, and two threads do not wait for each
other. Weights, gradients and activations are one memory each, and tables say where each layer's
begin.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from perennial.agents import blas
from perennial.agents.aside import Aside, Step, in_turn
from perennial.agents.blas import product
from perennial.agents.networks import MLP, Record, WrittenOut, gradient_of, norms_of, spelled
from perennial.plasticity import kernels
from perennial.plasticity.flat import flatten


class CompiledMLP(WrittenOut):
    """`WrittenOut` for ReLU networks on the CPU. Their weights, and gradients, move into one memory
    where they are not."""

    def __init__(self, net: MLP, only: slice | None = None):
        weights = flatten(list(net.parameters()))
        super().__init__(net, only)
        slopes = flatten([gradient_of(p) for p in net.parameters()])
        assert weights is not None and slopes is not None
        self._weights, self._slopes = kernels.array(weights), kernels.array(slopes)
        begin = weights.storage_offset()

        def place(parameter: Tensor | None) -> int:
            return -1 if parameter is None else int(parameter.storage_offset() - begin)

        # Of each layer: weights, biases, inputs, outputs, gains and offsets of a norm's.
        self._layers = np.zeros((len(self.layers), 6), np.int64)
        self._eps = np.full(len(self.layers), -1.0)
        norms = norms_of(net)
        for k, layer in enumerate(self.layers):
            norm, sizes = norms.get(layer), layer.weight.shape[:0:-1]
            self._layers[k] = place(layer.weight), place(layer.bias), *sizes, -1, -1
            if norm is not None:
                self._layers[k, 4:] = place(norm.weight), place(norm.bias)
                self._eps[k] = norm.eps
        self._copies = np.arange(self.layers[0].copies)[self.only]
        self._spaces: dict[int, _Space] = {}
        self._each = np.arange(self.copies)  # every copy has inputs of its own
        self._given = np.zeros((0, 0, 0)), self._each  # inputs, and which are each copy's
        self._others: np.ndarray | None = None  # gradients of the other thread's rows

    @staticmethod
    def fits(net: nn.Module) -> bool:
        """Whether `net` is linear layers with ReLU, and norms before it or none, on the CPU, in a
        precision that loops take."""
        return (
            blas.ready
            and re.fullmatch("(ln?a)+l", spelled(net)) is not None
            and isinstance(net[-2], nn.ReLU)  # type: ignore[index]
            and kernels.ready(*net.parameters())
        )

    def _at(self, batch: int) -> _Space:
        if batch not in self._spaces:
            widths = [int(n) for n in self._layers[:, 3]]
            places = np.cumsum([0, *widths]) * self.copies * batch
            memory = self.parts[0][0].new_empty(2, int(places[-1]))
            outs = [
                memory[0, a:b].view(self.copies, batch, n)
                for a, b, n in zip(places, places[1:], widths, strict=False)
            ]
            normed = int((self._eps >= 0).any())
            activations, spare = map(kernels.array, memory)
            normals = np.empty(normed * activations.size, activations.dtype)
            scales = np.empty((len(widths), normed * self.copies * batch), activations.dtype)
            self._spaces[batch] = _Space(outs, activations, normals, scales, spare, places)
        return self._spaces[batch]

    def forward(self, x: Tensor, record: Record | None = None, wants_input: bool = False) -> Tensor:
        """As `WrittenOut.forward`."""
        out = self._at(x.shape[1]).outs[-1]
        self._forward(x.contiguous(), self._each, out, record)()
        return out

    def forward_later(
        self, x: Tensor, out: Tensor, record: Record | None = None, wants_input: bool = False
    ) -> Step:
        """`forward` into `out`."""
        sources = self._copies * len(x) // len(out)
        if len(x) == self.copies and (sources == self._each).all():
            sources = self._each
        return self._forward(x, sources, out[self.only], record)

    def _forward(self, x: Tensor, sources: np.ndarray, out: Tensor, record: Record | None) -> Step:
        """Of x [S', B, n], of which `sources` [k] are the copies' own."""
        space = self._at(x.shape[1])
        self._given = kernels.array(x), sources
        given = *self._given, self._weights, self._layers, self._eps, self._copies
        memory = space.activations, space.normals, space.scales, space.places
        run = partial(_forward, *given, *memory, kernels.array(out))
        if record is None:
            return run

        def recorded() -> None:
            run()
            own = x if sources is self._each else x[torch.from_numpy(sources)]
            seen = [own, *space.outs[:-1]]
            for layer, h in zip(self.layers, seen, strict=True):
                record(layer, h)

        return recorded

    def backward(self, gradient: Tensor, aside: Aside | None = None) -> None:
        """As `WrittenOut.backward`; with a second thread, each takes half of the rows."""
        self._backward(gradient.contiguous(), aside)()

    def backward_later(self, gradient: Tensor, aside: Aside | None = None) -> Step:
        """`backward`."""
        return self._backward(gradient[self.only], aside)

    def _backward(self, gradient: Tensor, aside: Aside | None) -> Step:
        batch = gradient.shape[1]
        if aside is None or not aside.threaded:
            return self._rows(gradient, 0, batch, self._slopes)
        if self._others is None:
            self._others = np.zeros_like(self._slopes)
        upper = self._rows(gradient, 0, batch // 2, self._slopes)
        lower = self._rows(gradient, batch // 2, batch, self._others)
        return in_turn([aside.beside([upper], [lower]), partial(_add, self._slopes, self._others)])

    def _rows(self, gradient: Tensor, low: int, high: int, slopes: np.ndarray) -> Step:
        """The gradients of some rows alone, into `slopes`."""
        space = self._at(gradient.shape[1])
        given = kernels.array(gradient), *self._given, self._weights, slopes
        net = self._layers, self._eps, self._copies
        return partial(_backward, *given, *net, *space[1:], low, high)

    def input_gradient(self, gradient: Tensor, last: int) -> Tensor:
        """As `WrittenOut.input_gradient`: rows of which no gradient is asked are left out."""
        found = gradient.new_empty(*gradient.shape[:2], last)
        self._input_gradient(gradient.contiguous(), found)()
        return found

    def input_gradient_later(self, gradient: Tensor, out: Tensor) -> Step:
        """`input_gradient` into `out`."""
        return self._input_gradient(gradient[self.only], out[self.only])

    def _input_gradient(self, gradient: Tensor, out: Tensor) -> Step:
        space = self._at(gradient.shape[1])
        net = self._weights, self._layers, self._eps, self._copies
        return partial(
            _input_gradient, kernels.array(gradient), *net, *space[1:], kernels.array(out)
        )


class _Space(NamedTuple):
    """Memory of one batch size."""

    outs: list[Tensor]  # of each layer [k, B, n], after its activation
    activations: np.ndarray  # the same, one after the other
    normals: np.ndarray  # what norms give before gain and offset; empty where there are none
    scales: np.ndarray  # 1 / deviation of each norm's rows, [L, k * B]
    spare: np.ndarray  # gradients by activations
    places: np.ndarray  # where each layer's begin, int64 [L + 1]


_reordering = partial(kernels.compiled, reorders=True)


@kernels.compiled
def _add(total, more):  # type: ignore[no-untyped-def]
    for i in range(total.size):
        total[i] += more[i]


@kernels.compiled
def _of_copy(memory, begin, copy, size):  # type: ignore[no-untyped-def]
    """The vector of a copy, of those [S, size] that begin there; empty where nothing does."""
    at = begin + copy * size
    return memory[at : at + size] if begin >= 0 else memory[:0]


@kernels.compiled
def _sum_rows(d, normal, d_gain, d_offset):  # type: ignore[no-untyped-def]
    """Gradients by gain and offset of a norm, of rows of gradients by what it gives."""
    d_gain[:] = 0
    d_offset[:] = 0
    for r in range(d.shape[0] if d_gain.size else 0):
        row, own = d[r], normal[r]
        for i in range(row.size):
            d_gain[i] += row[i] * own[i]
            d_offset[i] += row[i]


@_reordering
def _normalise(row, normal, gain, offset, eps):  # type: ignore[no-untyped-def]
    """A row of pre-activations to activations in place, and to `normal`; 1 / their deviation."""
    number = row.dtype.type
    size, total, square = number(row.size), number(0), number(0)
    for i in range(row.size):
        total += row[i]
    mean = total / size
    for i in range(row.size):
        apart = row[i] - mean
        square += apart * apart
    scale = number(1 / math.sqrt(square / size + eps))
    for i in range(row.size):
        normal[i] = (row[i] - mean) * scale
    if gain.size:
        for i in range(row.size):
            value = normal[i] * gain[i] + offset[i]
            row[i] = number(0) if value <= 0 else value
    else:
        for i in range(row.size):
            row[i] = number(0) if normal[i] <= 0 else normal[i]
    return scale


@_reordering
def _through_norm(row, normal, gain, scale):  # type: ignore[no-untyped-def]
    """A row of gradients by what a norm gives to those by what it got, in place."""
    number = row.dtype.type
    size, total, along = number(row.size), number(0), number(0)
    if gain.size:
        for i in range(row.size):
            row[i] *= gain[i]
    for i in range(row.size):
        total += row[i]
        along += row[i] * normal[i]
    total, along = total / size, along / size
    for i in range(row.size):
        row[i] = scale * (row[i] - total - normal[i] * along)


@kernels.compiled
def _forward(  # type: ignore[no-untyped-def]
    x, sources, weights, layers, eps, copies, space, normals, scales, places, last
):
    """Outputs of the hidden layers into `space`, of the last into `last` [k, B, m].

    x: [S', B, n], of which `sources` [k] are the copies' own; weights: all layers', those of a
    layer [S, out, in], then [S, out]; layers, eps: see `CompiledMLP`; copies: which of the S, int64
    [k]; places: where each layer's outputs [k, B, out] begin, int64 [L + 1]; the others: see
    `_Space`.
    """
    batch = x.shape[1]
    for j in range(copies.size):
        h = x[sources[j]]
        for k in range(layers.shape[0]):
            w, b, n_in, n_out, gain, offset = layers[k]
            w, b = w + copies[j] * n_in * n_out, b + copies[j] * n_out
            begin = places[k] + j * batch * n_out
            weight, bias = (
                weights[w : w + n_in * n_out].reshape(n_out, n_in),
                weights[b : b + n_out],
            )
            out = last[j]
            if k < layers.shape[0] - 1:
                out = space[begin : begin + batch * n_out].reshape(batch, n_out)
            product(h, weight, out, False, True)
            if k == layers.shape[0] - 1:
                for r in range(batch):
                    row = out[r]
                    for i in range(n_out):
                        row[i] += bias[i]
            elif eps[k] >= 0:
                normal = normals[begin : begin + batch * n_out].reshape(batch, n_out)
                gains = _of_copy(weights, gain, copies[j], n_out)
                offsets = _of_copy(weights, offset, copies[j], n_out)
                for r in range(batch):
                    out[r] += bias
                    row = out[r]
                    scales[k, j * batch + r] = _normalise(row, normal[r], gains, offsets, eps[k])
            else:
                for r in range(batch):
                    row = out[r]
                    for i in range(n_out):
                        value = row[i] + bias[i]  # what is no number stays none
                        row[i] = row.dtype.type(0) if value <= 0 else value
            h = out


@kernels.compiled
def _backward(  # type: ignore[no-untyped-def]
    gradient, x, sources, weights, slopes, layers, eps, copies,
    space, normals, scales, spare, places, low, high,
):  # fmt: skip
    """Gradients of all layers by the rows `low` to `high`, into `slopes`, which is laid out as
    `weights`; those by a layer's outputs into `spare`, laid out as `space`.

    gradient: by the last layer's outputs [k, B, m]; x and the others as in `_forward`.
    """
    batch, rows = x.shape[1], high - low
    for j in range(copies.size):
        g = gradient[j, low:high]
        for k in range(layers.shape[0] - 1, -1, -1):
            w, b, n_in, n_out = layers[k, :4]
            w, b = w + copies[j] * n_in * n_out, b + copies[j] * n_out
            begin, h = 0, x[sources[j], low:high]
            if k > 0:
                begin = places[k - 1] + (j * batch + low) * n_in
                h = space[begin : begin + rows * n_in].reshape(rows, n_in)
            slope = slopes[b : b + n_out]
            slope[:] = 0
            for r in range(rows):
                row = g[r]
                for i in range(n_out):
                    slope[i] += row[i]
            product(g, h, slopes[w : w + n_in * n_out].reshape(n_out, n_in), True, False)
            if k > 0:
                d = spare[begin : begin + rows * n_in].reshape(rows, n_in)
                product(g, weights[w : w + n_in * n_out].reshape(n_out, n_in), d, False, False)
                for r in range(rows):
                    row, active = d[r], h[r]
                    for i in range(n_in):
                        row[i] = row.dtype.type(0) if active[i] <= 0 else row[i]
                if eps[k - 1] >= 0:
                    normal = normals[begin : begin + rows * n_in].reshape(rows, n_in)
                    gain, offset = layers[k - 1, 4:]
                    d_gain = _of_copy(slopes, gain, copies[j], n_in)
                    d_offset = _of_copy(slopes, offset, copies[j], n_in)
                    _sum_rows(d, normal, d_gain, d_offset)
                    gains = _of_copy(weights, gain, copies[j], n_in)
                    for r in range(rows):
                        scale = scales[k - 1, j * batch + low + r]
                        _through_norm(d[r], normal[r], gains, scale)
                g = d


@kernels.compiled
def _input_gradient(  # type: ignore[no-untyped-def]
    gradient, weights, layers, eps, copies, space, normals, scales, spare, places, found
):
    """Gradient by the last inputs into `found` [k, B, last], of rows that have one, if any; else
    zero."""
    batch, last = found.shape[1], found.shape[2]
    found[:] = 0
    rows = np.empty(batch, np.int64)
    for j in range(copies.size):
        count = 0
        for r in range(batch):
            if gradient[j, r].any():
                rows[count] = r
                count += 1
        g = np.empty((count, gradient.shape[2]), gradient.dtype)
        for r in range(count):
            g[r] = gradient[j, rows[r]]
        for k in range(layers.shape[0] - 1, 0, -1):
            w, _, n_in, n_out = layers[k, :4]
            w += copies[j] * n_in * n_out
            begin = places[k - 1] + j * batch * n_in
            d = spare[begin : begin + count * n_in].reshape(count, n_in)
            product(g, weights[w : w + n_in * n_out].reshape(n_out, n_in), d, False, False)
            for r in range(count):
                at = begin + rows[r] * n_in
                row, active = d[r], space[at : at + n_in]
                for i in range(n_in):
                    row[i] = row.dtype.type(0) if active[i] <= 0 else row[i]
                if eps[k - 1] >= 0:
                    gains = _of_copy(weights, layers[k - 1, 4], copies[j], n_in)
                    scale = scales[k - 1, j * batch + rows[r]]
                    _through_norm(row, normals[at : at + n_in], gains, scale)
            g = d
        w, _, n_in, n_out = layers[0, :4]
        w += copies[j] * n_in * n_out
        first = weights[w : w + n_in * n_out].reshape(n_out, n_in)
        part = np.empty((count, last), g.dtype)
        product(g, first[:, n_in - last :], part, False, False)
        for r in range(count):
            found[j, rows[r]] = part[r]
