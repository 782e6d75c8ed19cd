"""Multilayer perceptrons over all seeds of a process, and their passes written out for speed."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from perennial.agents.aside import Aside, Step
from perennial.plasticity.copies import BatchedLinear, Init
from perennial.plasticity.norms import BatchedLayerNorm

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
# In-place activation of a buffer, and gradient from (incoming gradient, activation) in place of the
# former: a fresh buffer of this size costs as much as a product, in page faults.
WRITTEN_OUT: dict[
    type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
] = {
    nn.ReLU: (
        torch.relu_,
        lambda grad, h: torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad),
    ),
    nn.Tanh: (
        torch.tanh_,
        lambda grad, h: torch.ops.aten.tanh_backward.grad_input(grad, h, grad_input=grad),
    ),
}


_HERE = Aside(False)
_WIDE = 128  # units of a layer from which it is worth a second thread
_LARGE = 1 << 22  # multiplications of a product from which choosing its rows pays


class MLP(nn.Sequential):
    """Linear layers with an activation between, for S seeds: [S, B, n_in] -> [S, B, n_out].

    Args:
        copies: S, the seeds trained as one batched network.
        sizes: input width, hidden widths, output width.
        activation: a key of ACTIVATIONS.
        hidden_init, output_init: how weights are drawn; biases start at zero.
        generators: one CPU generator per copy, so that a copy's weights do not depend on its
        company.
    """

    def __init__(
        self,
        copies: int,
        sizes: Sequence[int],
        activation: str,
        hidden_init: Init,
        output_init: Init,
        generators: Sequence[torch.Generator],
    ):
        layers: list[nn.Module] = []
        last = len(sizes) - 2
        for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            init = output_init if k == last else hidden_init
            layers.append(BatchedLinear(copies, n_in, n_out, init=init, generators=generators))
            if k < last:
                layers.append(ACTIVATIONS[activation]())
        super().__init__(*layers)


_List = Sequence[Tensor]
Record = Callable[[nn.Module, Tensor], None]


def gradient_of(parameter: Tensor | None) -> Tensor:
    """The parameter's gradient, a tensor that stays: it is written into and never replaced."""
    assert parameter is not None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class Training(ABC):
    """Training passes of a network.

    `forward_later` and its like lay a pass out once for many calls: a step on given memory of the
    whole network. They are asked for in the order in which they will be called.

    only: the copies that are served, of the network's S.
    """

    only = slice(None)

    @abstractmethod
    def forward(self, x: Tensor, record: Record | None = None, wants_input: bool = False) -> Tensor:
        """Output [S, B, n_out] of inputs [S, B, n_in]; `record` is told of each layer's inputs.

        `wants_input`: `input_gradient` will be asked for, in place of `backward`.
        """

    @abstractmethod
    def backward(self, gradient: Tensor, aside: Aside | None = None) -> None:
        """Write the gradients of sum(output * gradient) into every parameter's .grad."""

    @abstractmethod
    def input_gradient(self, gradient: Tensor, last: int) -> Tensor:
        """Gradient [S, B, last] of sum(output * gradient) by the last inputs, parameters apart."""

    def forward_later(
        self, x: Tensor, out: Tensor, record: Record | None = None, wants_input: bool = False
    ) -> Step:
        """`forward` of x [S', B, n_in] into `out` [S, B, n_out]; S / S' copies in a row share their
        inputs."""

        def run() -> None:
            own = spread(x, len(out))[self.only]
            out[self.only].copy_(self.forward(own, record, wants_input))

        return run

    def backward_later(self, gradient: Tensor, aside: Aside | None = None) -> Step:
        """`backward` from `gradient` [S, B, n_out]."""
        return partial(self.backward, gradient[self.only], aside)

    def input_gradient_later(self, gradient: Tensor, out: Tensor) -> Step:
        """`input_gradient` from `gradient` [S, B, n_out] into `out` [S, B, last]."""

        def run() -> None:
            found = self.input_gradient(gradient[self.only], out.shape[-1])
            out[self.only].copy_(found)

        return run


def spread(x: Tensor, copies: int) -> Tensor:
    """Inputs [copies, B, n] of x [S', B, n], each for as many copies in a row."""
    if len(x) == copies:
        return x
    return x.expand(copies, -1, -1) if len(x) == 1 else x.repeat_interleave(copies // len(x), 0)


class Autograd(Training):
    """Training passes of any network: forward, then backward from a gradient of the output.

    `learns`: whether a backward will ever be asked for; without, forwards are not recorded.
    """

    def __init__(self, net: nn.Module, learns: bool = True):
        self.net, self.learns = net, learns
        self.gradients = [gradient_of(p) for p in net.parameters()] if learns else []
        self.output: Tensor | None = None

    def forward(self, x: Tensor, record: Record | None = None, wants_input: bool = False) -> Tensor:
        """As `Training`; the modules' own hooks record activations, not `record`."""
        self.input = x.detach().requires_grad_(wants_input)
        with torch.set_grad_enabled(self.learns):
            self.output = self.net(self.input)
        return self.output.detach()

    def backward(self, gradient: Tensor, aside: Aside | None = None) -> None:
        assert self.output is not None
        torch._foreach_zero_(self.gradients)
        self.output.backward(gradient)
        self.output = None

    def input_gradient(self, gradient: Tensor, last: int) -> Tensor:
        assert self.output is not None
        (d_input,) = torch.autograd.grad(self.output, self.input, gradient)
        self.output = None
        return d_input[..., -last:]


def spelled(net: nn.Module) -> str:
    """A sequence as letters: linear layers with biases, norms, one known activation, `?` for
    anything else. Nothing where there are forward hooks (injected heads have some), which only
    modules run."""
    modules = list(net) if isinstance(net, nn.Sequential) else []
    if len(modules) < 3 or any(module._forward_hooks for module in (net, *modules)):
        return ""
    letters: dict[type, str] = {BatchedLinear: "l", BatchedLayerNorm: "n"}
    if type(modules[-2]) in WRITTEN_OUT:
        letters[type(modules[-2])] = "a"
    return "".join(
        "?" if isinstance(m, BatchedLinear) and m.bias is None else letters.get(type(m), "?")
        for m in modules
    )


def norms_of(net: MLP) -> dict[nn.Module, BatchedLayerNorm]:
    """The norm that follows a layer, where one does."""
    return {
        layer: norm for layer, norm in itertools.pairwise(net) if isinstance(norm, BatchedLayerNorm)
    }


def _tensors(layer: BatchedLinear) -> tuple[Tensor, Tensor]:
    """Weight and bias without their place in autograd; they share memory with the parameters."""
    assert layer.bias is not None
    return layer.weight.detach(), layer.bias.detach()


class WrittenOut(Training):
    """Training passes of a plain MLP (ReLU or tanh) without autograd, into reused buffers.

    Measured against autograd at two 256-256 networks and minibatches of 128: 1.3 times the updates
    per second on one thread, and two networks can train in two threads, because few operations hold
    the interpreter.
    """

    def __init__(self, net: MLP, only: slice | None = None):
        """`only`: the copies to serve, for passes of one network in two threads."""
        self.only = only = slice(None) if only is None else only
        self.layers: list[BatchedLinear] = [m for m in net if isinstance(m, BatchedLinear)]
        self.activate, self.differentiate = WRITTEN_OUT[type(net[-2])]
        self.copies = len(range(self.layers[0].copies)[only])
        # One copy is the ordinary case: plain matrix products on views made once.
        self.parts = [
            (weight[only][0], bias[only][0])
            if self.copies == 1
            else (weight[only], bias[only][:, None])
            for weight, bias in map(_tensors, self.layers)
        ]
        self.gradients = []
        for layer in self.layers:
            pair = gradient_of(layer.weight)[only], gradient_of(layer.bias)[only]
            self.gradients.append((pair[0][0], pair[1][0]) if self.copies == 1 else pair)
        self.hidden: list[Tensor] = []
        self.buffers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    @staticmethod
    def fits(net: nn.Module) -> bool:
        """Whether `net` is a plain MLP: linear and one known activation in turn, nothing else."""
        return re.fullmatch("(la)+l", spelled(net)) is not None

    def _space(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        if batch not in self.buffers:
            lead = (batch,) if self.copies == 1 else (self.copies, batch)
            outs = [weight.new_empty(*lead, weight.shape[-2]) for weight, _ in self.parts]
            self.buffers[batch] = outs, [torch.empty_like(out) for out in outs[:-1]]
        return self.buffers[batch]

    def forward(self, x: Tensor, record: Record | None = None, wants_input: bool = False) -> Tensor:
        """Output [S, B, n_out] in a buffer that the next forward of this batch size overwrites."""
        outs, _ = self._space(x.shape[1])
        alone = self.copies == 1
        last = len(outs) - 1
        self.hidden = []
        if alone:
            x = x[0]
        for k, ((weight, bias), out) in enumerate(zip(self.parts, outs, strict=True)):
            if record is not None:
                record(self.layers[k], x[None] if alone else x)
            self.hidden.append(x)
            if alone:
                x = torch.addmm(bias, x, weight.t(), out=out)
            else:
                x = torch.baddbmm(bias, x, weight.mT, out=out)
            if k < last:
                self.activate(x)
        return x[None] if alone else x

    def backward(self, gradient: Tensor, aside: Aside | None = None) -> None:
        """Write the gradients of sum(output * gradient) into every parameter's .grad.

        A layer's gradient by its weights is computed `aside`, while here it goes on to the inputs.
        """
        alone = self.copies == 1
        _, spare = self._space(gradient.shape[1])
        if alone:
            gradient = gradient[0]
        product = torch.mm if alone else torch.bmm
        aside = aside or _HERE

        def by_weights(k: int, gradient: Tensor, part: slice) -> None:
            d_weight, d_bias = self.gradients[k]
            torch.sum(gradient[..., part], -2, out=d_bias[..., part])
            product(gradient[..., part].mT, self.hidden[k], out=d_weight[..., part, :])

        def by_inputs(k: int, gradient: Tensor) -> Tensor:
            product(gradient, self.parts[k][0], out=spare[k - 1])
            return self.differentiate(spare[k - 1], self.hidden[k])

        whole = slice(None)
        for k in range(len(self.parts) - 1, 0, -1):
            if aside.threaded and gradient.shape[-1] >= _WIDE:
                gradient, _ = aside.pair(
                    partial(by_inputs, k, gradient), partial(by_weights, k, gradient, whole)
                )
            else:
                by_weights(k, gradient, whole)
                gradient = by_inputs(k, gradient)
        if aside.threaded and gradient.shape[-1] >= _WIDE:
            half = gradient.shape[-1] // 2
            aside.each(
                [
                    partial(by_weights, 0, gradient, part)
                    for part in (slice(half), slice(half, None))
                ]
            )
        else:
            by_weights(0, gradient, whole)

    def input_gradient(self, gradient: Tensor, last: int) -> Tensor:
        """Gradient [S, B, last] of sum(output * gradient) by the last inputs, parameters apart.

        Where products are large, rows of which no gradient is asked are left out of them.
        """
        weights = [weight for weight, _ in self.parts]
        weights[0] = weights[0][..., -last:]
        _, spare = self._space(gradient.shape[1])
        if self.copies == 1:
            return self._by_inputs(gradient[0], weights, self.hidden, spare)[None]
        if not self._large(gradient):
            return self._chain(gradient, weights, self.hidden, spare)
        each = zip(
            gradient, *(zip(*x, strict=True) for x in (weights, self.hidden, spare)), strict=True
        )
        return torch.stack([self._by_inputs(g, w, h, s) for g, w, h, s in each])

    def _large(self, gradient: Tensor) -> bool:
        """Whether it pays to look for rows without a gradient; never where that asks a device."""
        largest = max(w.shape[-2] * w.shape[-1] for w, _ in self.parts)
        return gradient.device.type == "cpu" and gradient.shape[-2] * largest > _LARGE

    def _by_inputs(self, gradient: Tensor, weights: _List, hidden: _List, spare: _List) -> Tensor:
        """The same of one copy: gradient [B, n_out] to [B, last]."""
        rows = gradient.any(-1).nonzero()[:, 0] if self._large(gradient) else None
        if rows is None or len(rows) == len(gradient):
            return self._chain(gradient, weights, hidden, spare)
        chosen = [h.index_select(0, rows) for h in hidden[1:]]
        space = [s[: len(rows)] for s in spare]
        found = self._chain(gradient.index_select(0, rows), weights, [rows, *chosen], space)
        return found.new_zeros(len(gradient), found.shape[1]).index_copy_(0, rows, found)

    def _chain(self, gradient: Tensor, weights: _List, hidden: _List, spare: _List) -> Tensor:
        for k in range(len(weights) - 1, 0, -1):
            torch.matmul(gradient, weights[k], out=spare[k - 1])
            gradient = self.differentiate(spare[k - 1], hidden[k])
        return gradient @ weights[0]
