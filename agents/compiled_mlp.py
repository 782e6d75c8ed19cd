"""Passes of a plain ReLU network in compiled loops around the BLAS: a whole pass of all copies is
one call, which holds no lock of the interpreter.

What a pass costs beside its matrix products then is little, and two threads do not wait for each
other. Weights, gradients and activations are one memory each, and tables say where each layer's
begin.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor, nn

from perennial.agents import blas
from perennial.agents.aside import Aside, Later
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
        total = self.layers[0].copies
        self._copies = np.arange(total)[slice(None) if only is None else only]
        self._spaces: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._led: dict[int, list[Tensor]] = {}  # outputs of the layers, `[copies, B, n]`
        self._given = np.zeros((0, 0, 0))
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

    def _space(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and spare gradients of the layers, `[copies, B, n]` or `[B, n]`."""
        if batch not in self.buffers:
            widths = [int(n) for n in self._layers[:, 3]]
            places = np.cumsum([0, *widths]) * self.copies * batch
            memory = self.parts[0][0].new_empty(2, int(places[-1]))
            lead = (batch,) if self.copies == 1 else (self.copies, batch)
            outs, spare = (
                [
                    part[a:b].view(*lead, n)
                    for a, b, n in zip(places, places[1:], widths, strict=False)
                ]
                for part in memory
            )
            self.buffers[batch] = outs, spare[:-1]
            self._led[batch] = [out.view(self.copies, batch, -1) for out in outs]
            self._spaces[batch] = kernels.array(memory[0]), kernels.array(memory[1]), places
        return self.buffers[batch]

    def forward(self, x: Tensor, record: Record | None = None, wants_input: bool = False) -> Tensor:
        """As `WrittenOut.forward`."""
        later = self.forward_later(x)
        later()
        if record is not None:
            led = [x, *self._led[x.shape[1]][:-1]]
            for layer, h in zip(self.layers, led, strict=True):
                record(layer, h)
        return later.value  # type: ignore[no-any-return]

    def forward_later(
        self, x: Tensor, record: Record | None = None, wants_input: bool = False
    ) -> Later:
        """`forward`."""
        if record is not None:
            return super().forward_later(x, record, wants_input)
        outs, _ = self._space(x.shape[1])
        x = x.contiguous()
        self._given = kernels.array(x)
        space, _, places = self._spaces[x.shape[1]]
        alone = self.copies == 1
        self.hidden = [x[0] if alone else x, *outs[:-1]]
        return Later(
            partial(
                _forward, self._given, self._weights, self._layers, self._copies, space, places
            ),
            self._led[x.shape[1]][-1],
        )

    def backward(self, gradient: Tensor, aside: Aside | None = None) -> None:
        """As `WrittenOut.backward`; with a second thread, each takes half of the rows."""
        if aside is None or not aside.threaded:
            self.backward_later(gradient)()
            return
        if self._others is None:
            self._others = np.zeros_like(self._slopes)
        half = gradient.shape[1] // 2
        upper = self._rows(gradient, 0, half, self._slopes)
        aside.run([upper], [self._rows(gradient, half, gradient.shape[1], self._others)])
        self._slopes += self._others

    def backward_later(self, gradient: Tensor) -> Later:
        """`backward`."""
        return self._rows(gradient, 0, gradient.shape[1], self._slopes)

    def _rows(self, gradient: Tensor, low: int, high: int, slopes: np.ndarray) -> Later:
        """The gradients of some rows alone, into `slopes`."""
        slope = kernels.array(gradient.contiguous())
        given = slope, self._given, self._weights, slopes, self._layers, self._copies
        return Later(partial(_backward, *given, *self._spaces[gradient.shape[1]], low, high))

    def input_gradient(self, gradient: Tensor, last: int) -> Tensor:
        """As `WrittenOut.input_gradient`: rows of which no gradient is asked are left out."""
        later = self.input_gradient_later(gradient, last)
        later()
        return later.value  # type: ignore[no-any-return]

    def input_gradient_later(self, gradient: Tensor, last: int) -> Later:
        """`input_gradient`."""
        found = gradient.new_zeros(*gradient.shape[:2], last)
        given = kernels.array(gradient.contiguous()), self._weights, self._layers, self._copies
        memory = *self._spaces[gradient.shape[1]], kernels.array(found)
        return Later(partial(_input_gradient, *given, *memory), found)


@kernels.compiled
def _forward(x, weights, layers, copies, space, places):  # type: ignore[no-untyped-def]
    """Outputs of all layers into `space`.

    x: [k, B, n]; weights: all layers', those of a layer [S, out, in], then [S, out]; layers: of
    each where weights and biases begin, inputs, outputs, int64 [L, 4]; copies: which of the S,
    int64 [k]; places: where each layer's outputs [k, B, out] begin, int64 [L + 1].
    """
    batch = x.shape[1]
    for j in range(copies.size):
        h = x[j]
        for k in range(layers.shape[0]):
            w, b, n_in, n_out = layers[k]
            w, b = w + copies[j] * n_in * n_out, b + copies[j] * n_out
            begin = places[k] + j * batch * n_out
            weight, bias = (
                weights[w : w + n_in * n_out].reshape(n_out, n_in),
                weights[b : b + n_out],
            )
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
    gradient, x, weights, slopes, layers, copies, space, spare, places, low, high
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
            begin, h = 0, x[j, low:high]
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
