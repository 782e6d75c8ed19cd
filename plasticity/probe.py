"""Finding the wiring of any model by poisoning its units, one row of a batch per unit.

One forward per layer: in row j of the batch unit j is NaN. Whatever functional operations lie on
the way (ReLU, pooling, flatten, concatenation, CReLU), the input features of another layer that
are NaN in row j are the columns of unit j. No naming convention and no tracing is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from perennial.plasticity.nonlinearity import recognise
from perennial.plasticity.units import (
    CONVOLUTIONS,
    WEIGHTED,
    Columns,
    Consumer,
    Layer,
    Site,
    Units,
)

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_NONNEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softplus, nn.Hardsigmoid)
_ROWS = 128  # units poisoned in one forward: bounds the memory of wide convolutions

Edges = Mapping[tuple[str, str], Tensor]


def find_units(
    model: nn.Module,
    example: Any,
    forward: Callable[[Any], Any] | None = None,
    *,
    edges: Edges | None = None,
    skip: Iterable[str] = (),
    keys: Mapping[str, str] | None = None,
) -> Units:
    """The hidden units of `model` and their wiring; leaves the model and all random streams as
    they were.

    Args:
        model: any module; Linear and Conv layers, batched or not, are looked at.
        example: a batch (tensor, or nest of tensors) that `forward` takes; tiled or cut to the rows
            that are needed. Batched models take `[S, B, ...]`, others `[B, ...]`.
        forward: how to call the model; default `model(example)`, `model(*example)` for a tuple.
        edges: columns `[n, k]` of pairs (producer, consumer) that the probe cannot see.
        skip: names of producers to leave out.
        keys: what layers are called in metrics, `<net>/<index>` by name; default from their names.

    Raises:
        ValueError: units mix before they reach the next layer (attention, functional
            normalisation): the pair is named; give `edges` for it or `skip` the producer.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> [(site.name, site.n) for site in find_units(net, torch.zeros(1, 3))]
        [('0', 5)]
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, WEIGHTED)}
    if not modules:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv layer: no units to find")
    known = dict(edges or {})
    skipped = {*skip, *(source for source, _ in known)}
    for name in {*skipped, *(consumer for _, consumer in known)}:
        if name not in modules:
            raise ValueError(f"no layer named {name!r}; there are {', '.join(modules)}")
    if forward is None:
        forward = _call(model)
    tags = _keys(list(modules)) | dict(keys or {})
    layers = {name: Layer(name, tags[name], m) for name, m in modules.items()}
    batched = any(layer.batched for layer in layers.values())
    axis = 1 if batched else 0
    probes = {name: _Probe(layer, layers) for name, layer in layers.items()}
    with _undisturbed(model):
        for name, probe in probes.items():
            if name not in skipped:
                probe.run(model, forward, example, axis)
    sites = []
    for name, probe in probes.items():
        tables = {c: _table(name, c, bad) for c, bad in probe.reached.items()}
        tables |= {consumer: t for (source, consumer), t in known.items() if source == name}
        if not tables:
            continue  # an output layer, or one that is never called
        device = layers[name].weight.device
        consumers = [Consumer(layers[c], Columns(t.to(device))) for c, t in tables.items()]
        obstacle = _own_obstacle(probe, consumers, modules)
        sites.append(Site(layers[name], consumers, probe.norms, probe.nonnegative, obstacle))
    _mark_shared_columns(sites)
    with _undisturbed(model):
        recognise(
            sites, list(model.modules()), _mixes, lambda rows: forward(_tile(example, axis, rows))
        )
    return Units(model, sites, list(layers.values()))


class _Probe:
    """Poisons the units of one layer, some rows at a time, and notes what becomes of them."""

    def __init__(self, layer: Layer, layers: Mapping[str, Layer]) -> None:
        self.layer, self.layers = layer, layers
        self.n = layer.weight.shape[1]
        self.reached: dict[str, Tensor] = {}  # consumer -> bool [n, features]
        self.norms: list[nn.Module] = []
        self.nonnegative = self.output = self.itself = self.repeated = False
        self.rows = self.units = torch.arange(0)
        self.calls = 0
        self.rectified: list[tuple[Tensor, int]] = []  # kept alive: their memory is not reused

    def run(self, model: nn.Module, forward: Callable[[Any], Any], example: Any, axis: int) -> None:
        with ExitStack() as hooks:
            for name, other in self.layers.items():
                hook = other.module.register_forward_pre_hook(partial(self.catch, name))
                hooks.callback(hook.remove)
            hooks.callback(self.layer.module.register_forward_hook(self.poison).remove)
            for module in model.modules():
                if _mixes(module):
                    hooks.callback(module.register_forward_hook(self.bypass).remove)
                elif isinstance(module, _NONNEGATIVE) or getattr(module, "nonnegative", False):
                    hooks.callback(module.register_forward_hook(self.rectify).remove)
            for start in range(0, self.n, _ROWS):
                self.calls = 0
                self.rows = torch.arange(
                    min(_ROWS, self.n - start), device=self.layer.weight.device
                )
                self.units = self.rows + start
                output = forward(_tile(example, axis, len(self.rows)))
                self.rectified.clear()
                self.output |= any(bool(t.isnan().any()) for t in _tensors(output))
                self.repeated |= self.calls > 1
                if not self.calls:
                    return

    def poison(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.calls += 1
        output = torch.zeros_like(output)
        if self.layer.batched:
            output[:, self.rows, self.units] = torch.nan
        elif isinstance(module, CONVOLUTIONS):
            output[self.rows, self.units] = torch.nan
        else:
            output[self.rows, ..., self.units] = torch.nan
        return output

    def catch(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Note which features saw which unit, then stop the spread."""
        x = inputs[0]
        bad = x.isnan()
        if not bad.any():
            return None
        if module is self.layer.module:
            self.itself = True
            return (x.nan_to_num(), *inputs[1:])
        seen = _features(bad, self.layers[name])
        if seen.shape[0] != len(self.rows):
            raise ValueError(
                f"units of {self.layer.name!r} reach {name!r} with {seen.shape[0]} rows for "
                f"{len(self.rows)}: rows are regrouped on the way; skip={{{self.layer.name!r}}}"
            )
        if not self.reached:
            self.nonnegative = any(
                out.data_ptr() == x.data_ptr()
                and out.numel() == x.numel()
                and x._version == version  # not changed in place since
                for out, version in self.rectified
            )
        if name not in self.reached:
            self.reached[name] = bad.new_zeros(self.n, seen.shape[1])
        self.reached[name][self.units] |= seen
        return (x.nan_to_num(), *inputs[1:])

    def bypass(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Tensor:
        """Norms keep units in place but mix them: let them pass, and note their gain and offset."""
        if module not in self.norms and inputs[0].isnan().any() and _per_unit(module, self.n):
            self.norms.append(module)
        return inputs[0]

    def rectify(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.rectified.append((output, output._version))


def _features(bad: Tensor, layer: Layer) -> Tensor:
    """Which features are NaN in which row of the batch, of a layer's input: `[rows, features]`."""
    if layer.batched:
        bad = bad[0]
    if isinstance(layer.module, CONVOLUTIONS):
        return bad.flatten(2).any(2)
    return bad.flatten(1, -2).any(1) if bad.ndim > 2 else bad


def _table(source: str, consumer: str, bad: Tensor) -> Tensor:
    """Columns `[n, k]` from the features that each unit reached; an error where units mix."""
    counts = bad.sum(1)
    if bool((bad.sum(0) > 1).any()) or bool((counts != counts[0]).any()):
        raise ValueError(
            f"units of {source!r} mix before {consumer!r}; give their columns as "
            f"edges={{({source!r}, {consumer!r}): columns}} or leave "
            f"them out with skip={{{source!r}}}"
        )
    return bad.nonzero()[:, 1].view(bad.shape[0], -1)


def _own_obstacle(
    probe: _Probe, consumers: list[Consumer], modules: Mapping[str, nn.Module]
) -> str:
    """Why this layer's units cannot be recycled, seen from the layer alone."""
    if probe.itself:
        return "its units feed the layer itself"
    if probe.output:
        return "its units also reach the model's output past every layer"
    if probe.repeated:
        return "it is called more than once in a forward"
    if sum(m.weight is probe.layer.module.weight for m in modules.values()) > 1:
        return "its weight is shared with another layer"
    for consumer in consumers:
        if getattr(consumer.layer.module, "groups", 1) > 1:
            return f"its consumer {consumer.layer.name!r} is a grouped convolution"
    return ""


def _mark_shared_columns(sites: list[Site]) -> None:
    """Residual streams and gates: two producers write to the same input features of a layer."""
    owners: dict[tuple[str, int], Site] = {}
    for site in sites:
        for consumer in site.consumers:
            for column in consumer.columns.table.flatten().tolist():
                other = owners.setdefault((consumer.layer.name, column), site)
                if other is not site:
                    for one, two in ((site, other), (other, site)):
                        one.obstacle = one.obstacle or (
                            f"{two.name!r} writes to the same inputs of {consumer.layer.name!r} "
                            f"(a residual stream or a gate)"
                        )


def _mixes(module: nn.Module) -> bool:
    """Norms keep units in place but mix them: they are passed by."""
    return isinstance(module, _NORMS) or getattr(module, "normalizes_units", False)


def _per_unit(module: nn.Module, n: int) -> bool:
    """Whether a norm has one gain (and offset) for each of n units."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape[-1] == n and weight.ndim <= 2


def _keys(names: list[str]) -> dict[str, str]:
    """Tags `<net>/<index>`: the net is the last telling part of the path to the layer's
    container."""
    parents = {}
    for name in names:
        path = name.split(".")[:-1]
        while path and path[-1].isdigit():
            path.pop()
        parents[name] = ".".join(path)
    full = sorted(set(parents.values()))
    short = {parent: parent.rpartition(".")[2] or "net" for parent in full}
    if len(set(short.values())) < len(short):
        short = {parent: parent or "net" for parent in full}
    counts: dict[str, int] = {}
    keys = {}
    for name in names:
        net = short[parents[name]]
        keys[name] = f"{net}/{counts.get(net, 0)}"
        counts[net] = counts.get(net, 0) + 1
    return keys


_under_way = 0


def probing() -> bool:
    """Whether a probe runs now: hooks that change what a network computes stand aside."""
    return _under_way > 0


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no argument checks; modes and random streams put back
    after."""
    modes = [(module, module.training) for module in model.modules()]
    checks = Distribution._validate_args
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    global _under_way
    _under_way += 1
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            Distribution.set_default_validate_args(False)  # NaN is not a valid mean
            yield
    finally:
        _under_way -= 1
        Distribution.set_default_validate_args(checks)
        for module, mode in modes:
            module.training = mode


def _call(model: nn.Module) -> Callable[[Any], Any]:
    return lambda example: model(*example) if isinstance(example, tuple) else model(example)


def _tile(example: Any, axis: int, rows: int) -> Any:
    """The example with exactly `rows` rows along the batch axis."""
    if isinstance(example, Tensor):
        if example.ndim <= axis or example.shape[axis] == 0:
            return example
        index = torch.arange(rows, device=example.device) % example.shape[axis]
        return example.detach().index_select(axis, index)
    if isinstance(example, Mapping):
        return {key: _tile(value, axis, rows) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return type(example)(_tile(v, axis, rows) for v in example)
    return example


def _tensors(output: Any) -> Iterator[Tensor]:
    """Floating point tensors in a nest of outputs."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
