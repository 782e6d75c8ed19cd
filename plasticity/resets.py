"""Starting over, wholly or in part: `reset`, `head-reset`, `optimizer-reset`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity.base import Intervention, Stage
from perennial.plasticity.fresh import (
    Slot,
    forget,
    fresh,
    parameters_of,
    put,
    restore_statistics,
    slots_of,
)
from perennial.plasticity.heads import head_slots, of_net
from perennial.plasticity.registry import check, default
from perennial.plasticity.timing import Due, Timing, stream_of
from perennial.plasticity.units import Units


class Reset(Intervention):
    """Now and then all parameters start anew, and the optimizer with them.

    Nikishin, Schwarzer, D'Oro, Bacon & Courville, The Primacy Bias in Deep Reinforcement Learning,
    ICML 2022 (arXiv 2205.07802); SR-SAC: D'Oro et al., ICLR 2023. Written for agents with a replay
    buffer, which re-teaches the network. Under PPO a full reset throws away what was learned:
    prefer `net=value`, or `shrink-perturb`.

    Every event draws new weights, as the layers were initialised; gains and offsets of norms, their
    running statistics and other parameters (log standard deviations) return to the start. Moments
    and step counts of the optimizer are cleared. Target networks (`attach(..., targets=...)`)
    become equal to the model.

    Args:
        every: steps of the optimizer between resets; 0 for none by count. See `Timing` for PPO.
        change: also when the host tells of a change.
        times: at most so many resets; 0 for any number (SR-SAC and BRO stop before the end).
        net: "all", or the name of the part that is reset.
        optimizer: "reset", or "keep" to leave its state.
        target: "copy", or "keep": target networks stay and re-teach the old function.

    Deviations: temperature and replay buffer are the host's. The published code builds each new
    network from the same seed; here no two resets draw the same weights.
    """

    name: ClassVar[str] = "reset"
    stage: ClassVar[Stage] = Stage.RESET
    events: Tensor

    def __init__(
        self,
        every: int = default("reset", "every"),
        change: bool = default("reset", "change"),
        times: int = default("reset", "times"),
        net: str = default("reset", "net"),
        optimizer: str = default("reset", "optimizer"),
        target: str = default("reset", "target"),
    ) -> None:
        super().__init__()
        given = {"every": every, "change": change, "times": times, "net": net}
        check(self.name, given | {"optimizer": optimizer, "target": target})
        self.timing, self.net = Timing(every, change, times), net
        self.forgets, self.copies_target = optimizer == "reset", target == "copy"
        self._slots: list[Slot] = []
        self._initial: dict[Slot, Tensor] = {}

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        every = slots_of(units, optimizer, self.targets)
        self._slots = of_net(self.name, every, units, self.net)
        self._whole = len(self._slots) == len(every)
        self.register_buffer("events", torch.zeros_like(self.clock.updates))
        self.timing.reload(self.events)
        for slot in self._slots:
            if slot.kind == "other":
                self.register_buffer(f"initial{slot.place}", slot.lead.clone())

    def _loaded(self) -> None:
        self.timing.reload(self.events)

    def after_step(self) -> None:
        due = self.timing.due(self.clock, self.events)
        if due is not None:
            self._reset(due)

    def on_change(self) -> None:
        due = self.timing.told(self.clock, self.events)
        if due is not None:
            self._reset(due)

    def _reset(self, due: Due) -> None:
        stream = stream_of(self.key, self.events)
        targets = self.targets if self.copies_target else ()
        for slot in self._slots:
            known = slot.kind == "other"
            new = self.get_buffer(f"initial{slot.place}") if known else fresh(slot, stream)
            put(slot.lead, new, due.copies)
            for value in slot.target_leads if targets else ():
                put(value, slot.lead, due.copies)
        restore_statistics(self.units.model, self._slots, due.copies, targets)
        if self.forgets:
            forget(self._optimizer, [slot.parameter for slot in self._slots], due.copies)
            if self._whole:
                self.moments.restart(due.copies)
        for method in self.company if self._whole else ():
            method._restarted(due.copies)
        self.events.add_(due.copies)


class HeadReset(Intervention):
    """Now and then the last layers start anew; the features stay.

    Nikishin et al. 2022 (arXiv 2205.07802) reset the final layer of SPR and the heads of DrQ;
    Dohare et al. 2024 (Nature 632) reset classifier heads at task changes: drawn anew, optimizer
    kept, for CIFAR-100 (`to=init,optimizer=keep`); set to zero for pairs of ImageNet (`to=zero`).

    Args:
        every: steps of the optimizer between resets; 0 for none by count. See `Timing` for PPO.
        change: also when the host tells of a change.
        times: at most so many resets; 0 for any number.
        net: "all" heads, or the name of the part whose heads are reset (PPO: `net=value` leaves the
            policy alone).
        depth: layers from the output back that make a head.
        to: "init" draws as the layer was initialised, "zero" gives zeros.
        optimizer: "reset" clears the optimizer's state of the head, "keep" leaves it.
        target: "copy" makes target networks' heads equal, "keep" leaves them (SPR).
    """

    name: ClassVar[str] = "head-reset"
    stage: ClassVar[Stage] = Stage.RESET
    events: Tensor

    def __init__(
        self,
        every: int = default("head-reset", "every"),
        change: bool = default("head-reset", "change"),
        times: int = default("head-reset", "times"),
        net: str = default("head-reset", "net"),
        depth: int = default("head-reset", "depth"),
        to: str = default("head-reset", "to"),
        optimizer: str = default("head-reset", "optimizer"),
        target: str = default("head-reset", "target"),
    ) -> None:
        super().__init__()
        given = {"every": every, "change": change, "times": times, "net": net, "depth": depth}
        check(self.name, given | {"to": to, "optimizer": optimizer, "target": target})
        self.timing, self.net, self.depth = Timing(every, change, times), net, depth
        self.zero, self.forgets, self.copies_target = (
            to == "zero",
            optimizer == "reset",
            target == "copy",
        )
        self._slots: list[Slot] = []

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        every = slots_of(units, optimizer, self.targets)
        chosen = of_net(self.name, every, units, self.net)
        self._slots = head_slots(units, chosen, self.depth)
        if not self._slots:
            raise ValueError(f"{self.name}: no output layer among the parameters of {self.net!r}")
        self.register_buffer("events", torch.zeros_like(self.clock.updates))
        self.timing.reload(self.events)

    def _loaded(self) -> None:
        self.timing.reload(self.events)

    def after_step(self) -> None:
        due = self.timing.due(self.clock, self.events)
        if due is not None:
            self._reset(due)

    def on_change(self) -> None:
        due = self.timing.told(self.clock, self.events)
        if due is not None:
            self._reset(due)

    def _reset(self, due: Due) -> None:
        stream = stream_of(self.key, self.events)
        for slot in self._slots:
            zero = self.zero and slot.kind in ("weight", "bias")
            put(slot.lead, 0.0 if zero else fresh(slot, stream), due.copies)
            for value in slot.target_leads if self.copies_target else ():
                put(value, slot.lead, due.copies)
        if self.forgets:
            forget(self._optimizer, [slot.parameter for slot in self._slots], due.copies)
        self.events.add_(due.copies)


class OptimizerReset(Intervention):
    """Now and then the optimizer forgets, the weights stay.

    Asadi, Fakoor & Sabach, Resetting the Optimizer in Deep RL, NeurIPS 2023 (arXiv 2306.17833):
    moments and step count to zero at every new target, since what was averaged belongs to another
    objective. Adam-Rel (Ellis et al., NeurIPS 2024, arXiv 2412.17113) keeps the moments and only
    restarts the step count (`what=step`): with unchanged gradients the next step shrinks to a
    third and grows back.

    Args:
        every: steps of the optimizer between resets; 0 for none by count. Adam-Rel under PPO: the
            steps of one rollout. See `Timing`.
        change: also when the host tells of a change.
        times: at most so many resets; 0 for any number.
        what: "all" clears moments and step count, "step" only the count.

    All of the optimizer's parameters, also those that are no units. The learning rate's schedule
    goes on.
    """

    name: ClassVar[str] = "optimizer-reset"
    stage: ClassVar[Stage] = Stage.RESET
    events: Tensor

    def __init__(
        self,
        every: int = default("optimizer-reset", "every"),
        change: bool = default("optimizer-reset", "change"),
        times: int = default("optimizer-reset", "times"),
        what: str = default("optimizer-reset", "what"),
    ) -> None:
        super().__init__()
        check(self.name, {"every": every, "change": change, "times": times, "what": what})
        self.timing, self.averages = Timing(every, change, times), what == "all"

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        if not self.averages and not _counts_steps(optimizer):
            raise ValueError(
                f"{self.name}: {type(optimizer).__name__} corrects nothing by a step count; take "
                f"what=all"
            )
        self.register_buffer("events", torch.zeros_like(self.clock.updates))
        self.timing.reload(self.events)

    def _loaded(self) -> None:
        self.timing.reload(self.events)

    def after_step(self) -> None:
        due = self.timing.due(self.clock, self.events)
        if due is not None:
            self._reset(due)

    def on_change(self) -> None:
        due = self.timing.told(self.clock, self.events)
        if due is not None:
            self._reset(due)

    def _reset(self, due: Due) -> None:
        parameters = parameters_of(self._optimizer)
        forget(self._optimizer, parameters, due.copies, averages=self.averages)
        self.moments.restart(due.copies)
        self.events.add_(due.copies)


def _counts_steps(optimizer: Optimizer) -> bool:
    """Whether it corrects averages by a step count, as the Adam family does."""
    return all("betas" in group for group in optimizer.param_groups)
