"""The methods at work on a Stable-Baselines3 model while it learns, and what is saved of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from perennial.plasticity import metrics
from perennial.plasticity.base import Intervention
from perennial.plasticity.sb3_networks import (
    Network,
    example_of,
    measured_batch,
    networks_of,
    part_of,
)

Log = Callable[[Mapping[str, float]], None]
# {"methods": {network: names}, "state": {network: {name: tensor}}, "references": the same of the
# metrics, "measured": env steps at the latest measurement or None, "task": int or None,
# "changed": whether the methods are still to be told of a change}
Snapshot = dict[str, Any]


class Part:
    """Methods at work on one network of a model."""

    def __init__(
        self,
        model: BaseAlgorithm,
        network: Network,
        methods: Sequence[Intervention],
        seed: int,
        log: Log,
    ) -> None:
        optimizer = network.optimizer
        assert optimizer is not None
        self.model, self.network, self.log = model, network, log
        self.measure_next = False
        self.units, self._recorder = network.find(example_of(model.policy), optimizer)
        self._hooks: list[Any] = []
        try:
            self.handle = network.attach([copy.deepcopy(m) for m in methods], self.units, seed)
        except Exception:
            self.close()
            raise
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.handle.before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]

    def _after(self) -> None:
        self.handle.after_step()
        if self.measure_next:
            self.measure_next = False
            self.log(self._measure())

    @torch.no_grad()
    def _measure(self) -> dict[str, Any]:
        """Metrics on stored observations; the recorded activations of training stay what they
        were."""
        batch = measured_batch(self.model)
        if batch is None:
            return {}
        recorded = [site.raw for site in self.units]
        modes = [(module, module.training) for module in self.network.module.modules()]
        try:
            self.network.module.eval()
            with self._recorder.recording():
                self.network.forward(batch)
            return dict(metrics.measure(self.units))
        finally:
            for module, mode in modes:
                module.training = mode
            for site, raw in zip(self.units, recorded, strict=True):
                site.raw = raw

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.units.close()
        self._recorder.close()


class Live:
    """All methods at work on a model: `model.plasticity` while it learns.

    Pickled (by `model.save`) it is its snapshot, so that a saved model can be loaded without this
    file.

    Args:
        methods: not attached yet; every network gets copies of those that concern it.
        before: snapshot of an earlier `learn` to go on from.
        measures: whether metrics are; what they compare with is part of the snapshot then.
    """

    def __init__(
        self,
        model: BaseAlgorithm,
        methods: Sequence[Intervention],
        seed: int,
        log: Log,
        before: Snapshot | None,
        measures: bool,
    ) -> None:
        self.measures = measures
        self.parts: list[Part] = []
        self.task: int | None = None
        self.changed = False  # the methods are to be told
        self.measured: int | None = None  # env steps at the latest measurement
        networks = networks_of(model.policy)
        shares = [[m for m in methods if network.concerns(m)] for network in networks]
        for method in methods:
            if not any(method in share for share in shares):
                known = sorted({name for network in networks for name in network.names})
                raise ValueError(
                    f"{method.name}: no part of {type(model).__name__}'s networks is named "
                    f"{part_of(method)!r} (known: {', '.join(known)})"
                )
        weights = {p: p.detach().clone() for p in model.policy.parameters()} if before else {}
        try:
            for network, share in zip(networks, shares, strict=True):
                self.parts.append(Part(model, network, share, seed, log))
            if before:
                self._restore(before)
        except Exception:
            self.close()
            raise
        with torch.no_grad():  # a method may put weights in order when attached: not a second time
            for parameter, value in weights.items():
                parameter.copy_(value)

    def counts(self) -> dict[str, int]:
        """Units recycled so far by each method, over all networks."""
        found: dict[str, int] = {}
        for part in self.parts:
            for name, count in part.handle.counts().items():
                found[name] = found.get(name, 0) + int(count.sum())
        return found

    def snapshot(self) -> Snapshot:
        """The state as plain tensors on the CPU."""
        handles = {part.network.name: part.handle for part in self.parts}
        references = {
            part.network.name: part.units.references for part in self.parts if self.measures
        }
        return {
            "methods": {net: list(handle.interventions) for net, handle in handles.items()},
            "state": {net: _on_cpu(handle.state_dict()) for net, handle in handles.items()},
            "references": {net: _on_cpu(own.state_dict()) for net, own in references.items()},
            "measured": self.measured,
            "task": self.task,
            "changed": self.changed,
        }

    def _restore(self, before: Snapshot) -> None:
        self.measured, self.task = before["measured"], before["task"]
        self.changed = before["changed"]
        for part in self.parts:
            name = part.network.name
            if name in before["references"]:
                part.units.references.load_state_dict(before["references"][name])
            own, had = list(part.handle.interventions), before["methods"][name]
            if not any(before["methods"].values()) and own:  # metrics alone: nothing to go on from
                continue
            if own != had:
                raise ValueError(
                    f"the model's {name} learned with methods {had}, now given are {own}: give the "
                    f"same, or set model.plasticity = None to begin their state anew"
                )
            part.handle.load_state_dict(before["state"][name])

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.snapshot(),)


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.cpu() for key, value in state.items()}
