"""Plasticity injection: heads freeze, and fresh ones learn what is to be added to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.branches import Branches, Frozen, branches_of
from perennial.plasticity.fresh import Slot, forget, fresh, put, slots_of
from perennial.plasticity.heads import feeders, layers_before, of_net, output_layers, owned_layers
from perennial.plasticity.registry import check, default
from perennial.plasticity.timing import Due, Timing, stream_of
from perennial.plasticity.units import Layer, Site, Units


class PlasticityInjection(Intervention):
    """Nikishin, Oh, Ostrovski, Lyle, Pascanu, Dabney & Barreto, Deep Reinforcement Learning with
    Plasticity Injection, NeurIPS 2023 (arXiv 2305.15555).

    A head h becomes `h_theta(z) + h_live(z) - h_twin(z)`: theta is what was learned, live and twin
    are the same fresh draw, theta and twin are frozen. Predictions and gradients into the encoder
    are unchanged at that moment, and as many weights train as before, with a clear optimizer state.

    The model's own parameters become the live head; theta and twin are buffers of this method, run
    by forward hooks on the head's layers. So a saved model needs this method's state too, and
    injected networks run as modules. Detaching the handle leaves the hooks: what the network
    computes stays as it is, also in deep copies of it.

    A linear head (`depth=1`) folds exactly: `theta + live - twin` is one matrix with the gradient
    of the live one, so that the weights stay as they are and only the optimizer's state is cleared.

    Args:
        every: steps of the optimizer between injections; 0 for none by count. See `Timing` for PPO.
        change: also when the host tells of a change.
        times: at most so many injections (published: once); every one adds two frozen heads to run.
        depth: layers from the output back that make a head. Where the layers of that depth do not
            form a closed part (residual streams, batch norm, other readers), the next smaller depth
            that does.
        net: "all", or the name of the part whose heads are injected.

    Target networks get the same head, theta too (published: their own theta, which would keep their
    distance from the online network for good).
    """

    name: ClassVar[str] = "injection"
    stage: ClassVar[Stage] = Stage.RESET
    events: Tensor

    def __init__(
        self,
        every: int = default("injection", "every"),
        change: bool = default("injection", "change"),
        times: int = default("injection", "times"),
        depth: int = default("injection", "depth"),
        net: str = default("injection", "net"),
    ) -> None:
        super().__init__()
        given = {"every": every, "change": change, "times": times, "depth": depth, "net": net}
        check(self.name, given)
        self.timing = Timing(every, change, times)
        self.times, self.depth, self.net = times, depth, net
        self._slots: list[Slot] = []  # of heads that freeze
        self._linear: list[Slot] = []  # of heads that fold

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        slots = of_net(self.name, slots_of(units, optimizer, self.targets), units, self.net)
        self.register_buffer("events", torch.zeros_like(self.clock.updates))
        self.timing.reload(self.events)
        if self.timing.never:
            return
        deep, linear = _heads(units, owned_layers(slots), self.depth)
        if not deep and not linear:
            raise ValueError(f"{self.name}: no output layer among the parameters of {self.net!r}")
        modules = [module for layer in deep for module in _modules(units, layer)]
        within = {p for module in modules for p in module.parameters(recurse=False)}
        self._slots = [slot for slot in slots if slot.parameter in within]
        self._linear = [slot for slot in slots if slot.layer in linear]
        self.frozen = Frozen(self._slots, self.times)
        for module in units.model.modules():  # of an earlier attachment
            for old in branches_of(module):
                if within.issuperset(module.parameters(recurse=False)):
                    self._inherit(old)
        names = {module: name for name, module in units.model.named_modules()}
        for target in self.targets:
            for module in modules:
                for old in branches_of(target.get_submodule(names[module])):
                    old.remove()
        self._branches = [
            Branches(
                network.get_submodule(names[module]),
                self.frozen,
                {
                    slot.name.rpartition(".")[2]: slot.place
                    for slot in self._slots
                    if slot.name.rpartition(".")[0] == names[module]
                },
                first=_is_first(units, module, deep),
                last=module in {layer.module for layer in output_layers(units, deep)},
            )
            for module in modules
            for network in (units.model, *self.targets)
        ]

    def _inherit(self, old: Branches) -> None:
        """Go on from the frozen heads that an earlier attachment left on the network."""
        old.remove()
        if old.frozen is not self.frozen and old.frozen.same(self.frozen):
            self.frozen.load_state_dict(old.frozen.state_dict())
            self.frozen.used = old.frozen.used
            self.events.fill_(old.frozen.used)
            self.timing.reload(self.events)

    def _loaded(self) -> None:
        self.timing.reload(self.events)
        if not self.timing.never:
            self.frozen.used = int(self.events.max())

    def after_step(self) -> None:
        due = self.timing.due(self.clock, self.events)
        if due is not None:
            self._inject(due)

    def on_change(self) -> None:
        due = self.timing.told(self.clock, self.events)
        if due is not None:
            self._inject(due)

    def _inject(self, due: Due) -> None:
        stream = stream_of(self.key, self.events)
        for slot in self._slots:
            new = fresh(slot, stream)
            for number, (theta, twin) in enumerate(self.frozen.pairs(slot.place)):
                chosen = due.copies & (self.events == number)
                put(theta, slot.lead, chosen)
                put(twin, new, chosen)
            for value in (slot.lead, *slot.target_leads):
                put(value, new, due.copies)
        parameters = [slot.parameter for slot in (*self._slots, *self._linear)]
        forget(self._optimizer, parameters, due.copies)
        self.events.add_(due.copies)
        # Where the host does not know, it runs all branches: those not used yet are zero.
        self.frozen.used = self.times if self.timing.most is None else self.timing.most


def _heads(units: Units, owned: Sequence[Layer], depth: int) -> tuple[set[Layer], set[Layer]]:
    """Layers of heads that freeze, each a closed part of the network, and linear ones that fold."""
    groups: list[tuple[list[Layer], set[Layer]]] = []  # outputs and layers, disjoint
    for output in output_layers(units, owned):
        outputs, layers = [output], {*layers_before(units, output, depth)}
        for group in [g for g in groups if not layers.isdisjoint(g[1])]:
            groups.remove(group)
            outputs, layers = [*group[0], *outputs], group[1] | layers
        groups.append((outputs, layers))
    deep: set[Layer] = set()
    linear: set[Layer] = set()
    for outputs, layers in groups:
        for less in range(depth, 1, -1):
            layers = {part for out in outputs for part in layers_before(units, out, less)}
            if layers != {*outputs} and layers <= {*owned} and _closed(units, layers):
                deep |= layers
                break
        else:
            linear |= {*outputs}
    return deep, linear


def _closed(units: Units, head: set[Layer]) -> bool:
    """Whether several heads can run side by side through these layers, seen by no others."""
    inner = [site for site in units if site.producer in head]
    for site in inner:
        if site.obstacle or not {c.layer for c in site.consumers} <= head:
            return False
        if any(isinstance(norm, nn.modules.batchnorm._BatchNorm) for norm in site.norms):
            return False
    for layer in head:
        sources = feeders(units, layer)
        inside = [site for site in sources if site.producer in head]
        if inside and (len(inside) < len(sources) or not _covers(inside, layer)):
            return False
    return True


def _covers(sites: Sequence[Site], layer: Layer) -> bool:
    """Whether the sites' units are all that the layer reads."""
    tables = [c.columns.table for site in sites for c in site.consumers if c.layer is layer]
    return sum(table.numel() for table in tables) == layer.weight.shape[2]


def _modules(units: Units, layer: Layer) -> list[nn.Module]:
    """The layer, and the norms between it and the next layer of the head."""
    sites = [site for site in units if site.producer is layer]
    return [layer.module, *(norm for site in sites for norm in site.norms)]


def _is_first(units: Units, module: nn.Module, head: set[Layer]) -> bool:
    """Whether a module of the head reads what comes from the encoder."""
    layers = [layer for layer in head if layer.module is module]
    return any(all(site.producer not in head for site in feeders(units, layer)) for layer in layers)
