"""Hidden units and their wiring: which weights lead into a unit, which lead out of it.

`find_units` (probe.py) makes them. Whatever the model, per-unit tensors carry the copies axis
first: `[S, n]`, with S = 1 for ordinary modules. Units of all sites also stand side by side in one
vector `[S, total]` (units.spans), so that per-unit bookkeeping costs one operation, not one per
layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perennial.plasticity.copies import BatchedConv2d, BatchedLinear, Init
from perennial.plasticity.references import References

BATCHED = (BatchedLinear, BatchedConv2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, BatchedConv2d)
WEIGHTED = (nn.Linear, BatchedLinear, *CONVOLUTIONS)


def sum_rows(x: Tensor, out: Tensor) -> Tensor:
    """Sum over axis 1 into a part of a vector, which compilers do not take as `out=`."""
    if torch.compiler.is_compiling():
        return out.copy_(x.sum(1))
    return torch.sum(x, 1, out=out)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a * b into a part of a vector."""
    return out.copy_(a * b) if torch.compiler.is_compiling() else torch.mul(a, b, out=out)


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear or convolutional layer: `name` in the model, `key` (`policy/0`) in tags."""

    name: str
    key: str
    module: Any  # one of WEIGHTED
    batched: bool = field(init=False)

    def __post_init__(self) -> None:
        # Whether weight and bias carry the copies axis.
        object.__setattr__(self, "batched", isinstance(self.module, BATCHED))

    @property
    def net(self) -> str:
        return self.key.rpartition("/")[0]

    @property
    def weight(self) -> Tensor:
        """`[S, out, in]`, convolutions `[S, out, in, *kernel]`: a view that may be written to."""
        weight: Tensor = self.module.weight.detach()
        return weight if self.batched else weight.unsqueeze(0)

    @property
    def bias(self) -> Tensor | None:
        """`[S, out]`, a view that may be written to; None where there is none."""
        bias: Tensor | None = self.module.bias
        if bias is None:
            return None
        return bias.detach() if self.batched else bias.detach().unsqueeze(0)

    @property
    def fan_in(self) -> int:
        return self.weight[0, 0].numel()

    def led(self, x: Tensor) -> Tensor:
        """What the layer is given or gives, copies first and units last: `[S, B, ..., n]`."""
        x = x if self.batched else x.unsqueeze(0)
        return x.movedim(2, -1) if isinstance(self.module, CONVOLUTIONS) else x

    @property
    def fan_out(self) -> int:
        shape = self.weight.shape
        return shape[1] * (self.weight[0, 0, 0].numel() if len(shape) > 3 else 1)

    @property
    def init(self) -> Init:
        """How it was drawn: as the layer says (`layer.init`), else as torch draws by default."""
        init = getattr(self.module, "init", None)
        return init if isinstance(init, Init) else Init("torch-default", bias="torch-default")


class Columns:
    """Which input features of a consumer belong to each unit: a table `[n, k]`.

    k = 1 for plain layers, H*W for a channel that is flattened, 2 for CReLU. Regular tables are
    kept as (offset, strides), so that gathering is a view.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table  # int64 [n, k]
        self.n, self.k = table.shape
        self.offset = int(table.min())
        ramp = torch.arange(self.n * self.k, device=table.device) + self.offset
        self.blocks = bool((table == ramp.view(self.n, self.k)).all())
        self.stripes = bool((table == ramp.view(self.k, self.n).t()).all())

    def gather(self, x: Tensor) -> Tensor:
        """Features `[..., in]` -> `[..., n, k]`, a view where the table is regular."""
        if self.blocks or self.stripes:
            if x.shape[-1] != self.n * self.k:
                x = x.narrow(-1, self.offset, self.n * self.k)
            if self.k == 1:
                return x.unsqueeze(-1)
            if self.blocks:
                return x.unflatten(-1, (self.n, self.k))
            return x.unflatten(-1, (self.k, self.n)).transpose(-1, -2)
        return x[..., self.table]

    def scatter(self, values: Tensor, features: int, rest: float) -> Tensor:
        """Values `[S, n, 1 or k]` at the units' input features, `rest` elsewhere: `[S, in]`."""
        if self.k == 1 and self.blocks and features == self.n:
            return values.squeeze(-1)
        full = values.new_full((len(values), features), rest)
        full[:, self.table] = values.expand(-1, -1, self.k)
        return full


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads the units, and where."""

    layer: Layer
    columns: Columns

    @property
    def plain(self) -> bool:
        """The ordinary case, without detours: one column per unit, and nothing but units."""
        return (
            self.columns.k == 1
            and self.columns.blocks
            and not isinstance(self.layer.module, CONVOLUTIONS)
            and self.layer.weight.shape[2] == self.columns.n
        )


@dataclass(eq=False)
class Site:
    """One hidden layer's units: producer, optional norms on the way, every consumer.

    Attributes:
        producer: layer whose rows are the units' incoming weights.
        consumers: layers that read them; activations are the input of the first.
        norms: normalisation modules with one gain and offset per unit.
        nonnegative: activations come out of an `nn.ReLU` and the like, so |h| = h.
        obstacle: why units here cannot be recycled (a residual stream, say); "" when they can.
        nonlinearity: "relu", "leaky-relu", "tanh", "sigmoid", "crelu"; "" for any other.
        raw: input of the first consumer in the latest training forward, as it came.
        preactivation: mean and standard deviation `[S, n]` of what the producer put out in the
            latest forward inside `units.recording()`.
    """

    producer: Layer
    consumers: list[Consumer]
    norms: list[nn.Module] = field(default_factory=list)
    nonnegative: bool = False
    obstacle: str = ""
    nonlinearity: str = ""
    raw: Tensor | None = None
    preactivation: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self._plain = self.consumers[0].plain

    @property
    def name(self) -> str:
        return self.producer.name

    @property
    def key(self) -> str:
        return self.producer.key

    @property
    def net(self) -> str:
        return self.producer.net

    @property
    def n(self) -> int:
        """Number of units."""
        return self.producer.weight.shape[1]

    @property
    def columns(self) -> Columns:
        return self.consumers[0].columns

    @property
    def features(self) -> Tensor:
        """Latest training activations `[S, rows, n, k]`; rows = B, or B*H*W of a convolution."""
        if self.raw is None:
            raise ValueError(
                f"no activations of {self.name!r} yet: run a training forward (gradients enabled) "
                f"after find_units, or one inside units.recording()"
            )
        consumer = self.consumers[0]
        x = consumer.layer.led(self.raw)
        if x.ndim > 3:
            x = x.flatten(1, -2)
        return consumer.columns.gather(x)

    @property
    def activation(self) -> Tensor:
        """Latest training activations `[S, rows, n]`, after the nonlinearity; the k columns of a
        unit (positions of a channel, halves of a CReLU) count as further rows."""
        raw = self.raw
        if self._plain and raw is not None:
            if self.consumers[0].layer.batched:
                return raw
            if raw.ndim == 2:
                return raw.unsqueeze(0)
        x = self.features
        return x.squeeze(-1) if x.shape[-1] == 1 else x.transpose(-1, -2).flatten(1, 2)

    def outgoing(self) -> Tensor:
        """Mean |outgoing weight| of each unit over all consumers, per column: `[S, n, k]`."""
        return self.outgoing_sum() / self.outgoing_rows

    @property
    def outgoing_rows(self) -> int:
        """Weights per column over all consumers."""
        weights = [consumer.layer.weight for consumer in self.consumers]
        return sum(w.shape[1] * (w[0, 0, 0].numel() if w.ndim > 3 else 1) for w in weights)

    def outgoing_sum(self, out: Tensor | None = None) -> Tensor:
        """Sum of |outgoing weight|, `[S, n, k]`, or written to `out`, `[S, n]` where k = 1."""
        if self._plain and out is not None and len(self.consumers) == 1:
            layer = self.consumers[0].layer
            weight = layer.module.weight.abs()
            return sum_rows(weight if layer.batched else weight.unsqueeze(0), out)
        sums = self._outgoing_sum()
        return sums if out is None else out.copy_(sums.squeeze(-1) if out.ndim == 2 else sums)

    def _outgoing_sum(self) -> Tensor:
        sums = None
        for consumer in self.consumers:
            weight = consumer.layer.weight.abs()
            weight = weight.flatten(3).sum(-1) if weight.ndim > 3 else weight
            total = consumer.columns.gather(weight.sum(1))
            # Consumers that read the units differently (a convolution and a flattened head).
            if sums is not None and total.shape[-1] != sums.shape[-1]:
                total, sums = total.mean(-1, keepdim=True), sums.mean(-1, keepdim=True)
            sums = total if sums is None else sums + total
        assert sums is not None
        return sums.expand(-1, -1, self.columns.k)

    def incoming(self) -> Tensor:
        """Mean |incoming weight| of each unit: `[S, n]`."""
        return self.producer.weight.abs().flatten(2).mean(-1)


@dataclass(eq=False)
class Tap:
    """Input of a module in the latest training forward, as it came; None before the first.

    others: its further inputs by position, without gradients.
    """

    raw: Tensor | None = None
    others: tuple[Any, ...] = ()


class Units:
    """All sites of a model, and the recorder of their activations.

    Iterating gives the sites; `spans` their places in vectors over all sites; `layers` also holds
    the output layers, `references` what metrics measure distances from.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        layers: Sequence[Layer],
        hooks: bool = True,
        references: References | None = None,
    ) -> None:
        self.model, self.sites, self.layers = model, list(sites), list(layers)
        self.copies = layers[0].weight.shape[0] if layers else 1
        self.batched = any(layer.batched for layer in layers)
        self.spans: list[slice] = []
        self.total = 0
        for site in sites:
            self.spans.append(slice(self.total, self.total + site.n))
            self.total += site.n
        self.references = References(layers, sites) if references is None else references
        self._forced = False
        self._readers: dict[nn.Module, list[Site | Tap]] = {}
        for site in sites:
            self._readers.setdefault(site.consumers[0].layer.module, []).append(site)
        self._hooks: dict[nn.Module, RemovableHandle] = {}
        for module in self._readers if hooks else ():
            self._hooks[module] = module.register_forward_pre_hook(_Recorder(self))

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight.device if self.layers else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].weight.dtype if self.layers else torch.get_default_dtype()

    def record(self, layer: nn.Module, inputs: Tensor) -> None:
        """Note `inputs` of `layer` in a training forward: what the hook does, for written-out
        passes."""
        for reader in self._readers.get(layer, ()):
            reader.raw = inputs.detach() if inputs.requires_grad else inputs

    def accompany(self, module: nn.Module, others: tuple[Any, ...]) -> None:
        """Note the further inputs of a watched module."""
        for reader in self._readers.get(module, ()):
            if isinstance(reader, Tap):
                reader.others = tuple(x.detach() if isinstance(x, Tensor) else x for x in others)

    def watch(self, module: nn.Module) -> Tap:
        """Record the (first) input of any module in training forwards, as if it read units."""
        tap = Tap()
        self._readers.setdefault(module, []).append(tap)
        if module not in self._hooks:
            self._hooks[module] = module.register_forward_pre_hook(_Recorder(self))
        return tap

    def forget(self, tap: Tap) -> None:
        """Stop recording what `watch` gave."""
        for module, readers in self._readers.items():
            if tap in readers:
                readers.remove(tap)
                if not readers:
                    self._hooks.pop(module).remove()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record also while gradients are off, and the pre-activations' means and deviations:
        `with torch.no_grad(), units.recording(): net(x)`."""
        self._forced, before = True, self._forced
        hooks = [
            site.producer.module.register_forward_hook(partial(_summarise, site))
            for site in self.sites
        ]
        try:
            yield
        finally:
            self._forced = before
            for hook in hooks:
                hook.remove()

    def only(self, sites: Sequence[Site]) -> Units:
        """Some of the sites, which go on being recorded by the hooks that exist."""
        return Units(self.model, sites, self.layers, hooks=False, references=self.references)

    def close(self) -> None:
        """Remove the recording hooks."""
        for hook in self._hooks.values():
            hook.remove()


@torch.no_grad()
def _summarise(site: Site, module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Note mean and deviation of a producer's output; now, as it may be changed in place."""
    x = site.producer.led(output.detach())
    x = x.flatten(1, -2) if x.ndim > 3 else x
    mean = x.mean(1)
    site.preactivation = mean, (x - mean.unsqueeze(1)).square_().mean(1).sqrt_()


class _Recorder:
    """The forward pre-hook. Copies of a model (target networks) keep it; it ignores their
    layers."""

    def __init__(self, units: Units | None = None) -> None:
        self.units = units

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        units = self.units
        if units is not None and inputs and (units._forced or torch.is_grad_enabled()):
            units.record(module, inputs[0])
            if len(inputs) > 1:
                units.accompany(module, inputs[1:])

    def __deepcopy__(self, memo: dict[int, object]) -> _Recorder:
        return _Recorder()

    def __reduce__(self) -> tuple[type[_Recorder], tuple[()]]:
        return _Recorder, ()
