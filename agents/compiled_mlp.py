"""Passes of a plain ReLU network in compiled loops around the BLAS: a whole pass of all copies is
one call, which holds no lock of the interpreter.

What a pass costs beside its matrix products then is little, and two threads do not wait for each
other. Weights, gradients and activations are one memory each, and tables say where each layer's
begin.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from perennial.agents import blas
from perennial.agents.aside import Aside, Step, in_turn
from perennial.agents.blas import product
from perennial.agents.networks import MLP, Record, WrittenOut
from perennial.plasticity import kernels
from perennial.plasticity.flat import flatten


class CompiledMLP(WrittenOut):
    """`WrittenOut` for ReLU networks on the CPU. Their weights, and gradients, move into one memory
    where they are not."""

    def __init__(self, net: MLP, only: slice | None = None):
        weights = flatten(list(net.parameters()))
        super().__init__(net, only)
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        slopes = flatten(gradients)
        assert weights is not None and slopes is not None
        self._weights, self._slopes = kernels.array(weights), kernels.array(slopes)
        begin = weights.storage_offset()
        table = []
        for layer in self.layers:
            assert layer.bias is not None
            starts = (t.storage_offset() - begin for t in (layer.weight, layer.bias))
            table.append((*starts, *layer.weight.shape[:0:-1]))
        self._layers = np.array(table, np.int64)
        self._copies = np.arange(self.layers[0].copies)[self.only]
        self._spaces: dict[int, _Space] = {}
        self._given = np.zeros((0, 0, 0)), self._copies  # inputs, and which are each copy's
        self._others: np.ndarray | None = None  # gradients of the other thread's rows

    @staticmethod
    def fits(net: nn.Module) -> bool:
        """Whether `net` is a plain ReLU network on the CPU, in a precision that loops take."""
        return (
            blas.ready
            and WrittenOut.fits(net)
            and isinstance(net[1], nn.ReLU)  # type: ignore[index]
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
            activations, spare = map(kernels.array, memory)
            self._spaces[batch] = _Space(outs, activations, spare, places)
        return self._spaces[batch]

    def forward(self, x: Tensor, record: Record | None = None, wants_input: bool = False) -> Tensor:
        """As `WrittenOut.forward`."""
        out = self._at(x.shape[1]).outs[-1]
        self._forward(x.contiguous(), np.arange(self.copies), out, record)()
        return out

    def forward_later(
        self, x: Tensor, out: Tensor, record: Record | None = None, wants_input: bool = False
    ) -> Step:
        """`forward` into `out`."""
        sources = self._copies * len(x) // len(out)
        return self._forward(x, sources, out[self.only], record)

    def _forward(self, x: Tensor, sources: np.ndarray, out: Tensor, record: Record | None) -> Step:
        """Of x [S', B, n], of which `sources` [k] are the copies' own."""
        space = self._at(x.shape[1])
        self._given = kernels.array(x), sources
        given = *self._given, self._weights, self._layers, self._copies
        run = partial(_forward, *given, space.activations, space.places, kernels.array(out))
        if record is None:
            return run

        each = np.array_equal(sources, np.arange(len(x)))

        def recorded() -> None:
            run()
            seen = [x if each else x[torch.from_numpy(sources)], *space.outs[:-1]]
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
        memory = space.activations, space.spare, space.places
        return partial(_backward, *given, self._layers, self._copies, *memory, low, high)

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
        given = kernels.array(gradient), self._weights, self._layers, self._copies
        memory = space.activations, space.spare, space.places
        return partial(_input_gradient, *given, *memory, kernels.array(out))


class _Space(NamedTuple):
    """Memory of one batch size."""

    outs: list[Tensor]  # of each layer [k, B, n], after its activation
    activations: np.ndarray  # the same, one after the other
    spare: np.ndarray  # gradients by them
    places: np.ndarray  # where each layer's begin, int64 [L + 1]


@kernels.compiled
def _add(total, more):  # type: ignore[no-untyped-def]
    for i in range(total.size):
        total[i] += more[i]


@kernels.compiled
def _forward(x, sources, weights, layers, copies, space, places, last):  # type: ignore[no-untyped-def]
    """Outputs of the hidden layers into `space`, of the last into `last` [k, B, m].

    x: [S', B, n], of which `sources` [k] are the copies' own; weights: all layers', those of a
    layer [S, out, in], then [S, out]; layers: of each where weights and biases begin, inputs,
    outputs, int64 [L, 4]; copies: which of the S, int64 [k]; places: where each layer's outputs
    [k, B, out] begin, int64 [L + 1].
    """
    batch = x.shape[1]
    for j in range(copies.size):
        h = x[sources[j]]
        for k in range(layers.shape[0]):
            w, b, n_in, n_out = layers[k]
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
            else:
                for r in range(batch):
                    row = out[r]
                    for i in range(n_out):
                        value = row[i] + bias[i]  # what is no number stays none
                        row[i] = row.dtype.type(0) if value <= 0 else value
            h = out


@kernels.compiled
def _backward(  # type: ignore[no-untyped-def]
    gradient, x, sources, weights, slopes, layers, copies, space, spare, places, low, high
):
    """Gradients of all layers by the rows `low` to `high`, into `slopes`, which is laid out as
    `weights`; those by a layer's outputs into `spare`, laid out as `space`.

    gradient: by the last layer's outputs [k, B, m]; x and the others as in `_forward`.
    """
    batch, rows = x.shape[1], high - low
    for j in range(copies.size):
        g = gradient[j, low:high]
        for k in range(layers.shape[0] - 1, -1, -1):
            w, b, n_in, n_out = layers[k]
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
                g = d


@kernels.compiled
def _input_gradient(gradient, weights, layers, copies, space, spare, places, found):  # type: ignore[no-untyped-def]
    """Gradient by the last inputs into `found` [k, B, last], of rows that have one; else zero."""
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
            w, _, n_in, n_out = layers[k]
            w += copies[j] * n_in * n_out
            begin = places[k - 1] + j * batch * n_in
            d = spare[begin : begin + count * n_in].reshape(count, n_in)
            product(g, weights[w : w + n_in * n_out].reshape(n_out, n_in), d, False, False)
            for r in range(count):
                at = begin + rows[r] * n_in
                row, active = d[r], space[at : at + n_in]
                for i in range(n_in):
                    row[i] = row.dtype.type(0) if active[i] <= 0 else row[i]
            g = d
        w, _, n_in, n_out = layers[0]
        w += copies[j] * n_in * n_out
        first = weights[w : w + n_in * n_out].reshape(n_out, n_in)
        part = np.empty((count, last), g.dtype)
        product(g, first[:, n_in - last :], part, False, False)
        for r in range(count):
            found[j, rows[r]] = part[r]
