"""The protocol of plasticity methods, and how they get into a training loop.

    handle = attach([ContinualBackprop(rate=1e-4), "l2:strength=1e-3"], units, optimizer)
    loss.backward(); optimizer.step()          # the methods act here

A new method is one file with a subclass of `Intervention` and one entry in a catalogue.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity import draws, registry
from perennial.plasticity.adam import Active
from perennial.plasticity.clock import Clock
from perennial.plasticity.copies import Init
from perennial.plasticity.moments import Moments
from perennial.plasticity.surgery import Selection, recycle
from perennial.plasticity.units import Units

FRESH = 2  # word of the stream of fresh weights under a method's key
HOOKS = ("rewrite", "bind", "before_step", "after_step", "on_change")


class Stage(enum.IntEnum):
    """When a method acts among the others of one optimizer, whatever their order in the list.

    Projection comes before recycling, so that fresh weights survive it; averages and resets see the
    final weights. Methods of one stage act in the order given.
    """

    OPTIMIZER = 0  # settings of the optimizer
    DECAY = 1  # pulls: penalties, weight decay
    PROJECT = 2
    NOISE = 3
    RECYCLE = 4
    AVERAGE = 5
    RESET = 6


class Intervention(nn.Module):
    """A plasticity method acting on a network and its optimizer.

    Subclasses give `name` and `stage`, take their defaults from registry.py, and override any of
    the hooks below; a public method that looks like a hook but is none is refused. Hooks run
    without gradients. In `after_step` nothing may depend on a tensor's value on the host
    (`.item()`, `if`): fixed shapes and masks only, and `self.clock` for what the host knows.

    State is registered buffers whose first axis is the copies: then checkpoints per seed, state
    dicts and resume need no code. Public conventions: a buffer `replaced` (int64 `[S]`) counts
    recycled units and appears in `handle.counts()`.

    Set by `attach`, before `bind`:
        clock: steps per copy, which copies the current step moves, `clock.due(every)`.
        moments: the optimizer's state of units, for recycling.
        key: int64 buffer `[S]`, key of this method's own random stream (draws.py).
        units: the units it acts on.
        targets: networks like `units.model` that follow it; methods that jump take them along.
        company: the methods on the same optimizer, this one among them.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[Stage] = Stage.RECYCLE
    observes: ClassVar[bool] = False  # needs activations of training forwards
    rewrites: ClassVar[bool] = False  # changes the network itself (architecture.py)
    # before_step only reads gradients, and before penalties of others join them.
    reads_gradients: ClassVar[bool] = False
    clock: Clock
    moments: Moments
    units: Units
    targets: tuple[nn.Module, ...]
    company: tuple[Intervention, ...]
    key: Tensor
    _keys: list[int]  # the same on the host

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for attribute, value in vars(cls).items():
            public = callable(value) and not attribute.startswith("_")
            if not public or attribute in HOOKS or hasattr(Intervention, attribute):
                continue
            close = difflib.get_close_matches(attribute, HOOKS, 1, 0.75)
            if close or attribute.startswith(("before_", "after_", "on_")):
                advice = f"did you mean {close[0]!r}? " if close else ""
                raise ValueError(
                    f"{cls.__name__}.{attribute} is no hook; {advice}hooks are {', '.join(HOOKS)} "
                    f"(helpers start with an underscore)"
                )

    def rewrite(
        self, net: nn.Sequential, generators: Sequence[torch.Generator] | None = None
    ) -> bool:
        """Change one trunk in place, before it has an optimizer; False where it has nothing to
        change. Called by `architecture.rewrite`, only for methods with `rewrites`.

        generators: one per copy, for batched layers that are drawn anew; None: torch's own.
        """
        return False

    def bind(self, units: Units, optimizer: Optimizer) -> None:
        """Allocate state from the wiring; called once by `attach`."""

    def before_step(self) -> None:
        """Gradients are ready (and clipped): add penalties' gradients."""

    def after_step(self) -> None:
        """Weights moved: recycle, shrink, project, average."""

    def on_change(self) -> None:
        """The host says that the task changed; only for methods that are told."""

    def _restarted(self, copies: Tensor) -> None:
        """All weights of these copies (bool `[S]`) were drawn anew by another method: forget what
        was gathered about the old ones."""

    def _detached(self) -> None:
        """The handle stops acting: take back hooks of one's own, if any."""

    def _loaded(self) -> None:
        """State was loaded: rebuild what the host derives from it, if anything."""

    def _recycle(
        self,
        selections: Sequence[Selection],
        *,
        treatment: str = "exact",
        means: Sequence[Tensor] | None = None,
        init: Init | None = None,
    ) -> None:
        """`surgery.recycle` with this method's stream at the current step, counted in
        `replaced`."""
        stream = self._stream(FRESH)
        recycle(selections, stream, self.moments, treatment=treatment, means=means, init=init)
        replaced = getattr(self, "replaced", None)
        if isinstance(replaced, Tensor):
            for selection in selections:
                replaced.add_(selection.count)

    def _stream(self, word: int, *words: int) -> draws.Stream:
        """This method's random numbers of the current step, under some words of its choice."""
        known = self.clock.known
        stream = (
            draws.Stream(self.key)
            if known is None
            else draws.Stream.known(self._keys, self.key.device)
        )
        for each in (word, *words):
            stream = stream.fold(each)
        if known is None:
            return draws.Stream(draws.fold(stream.keys, self.clock.updates))
        return stream.at(known)


def attach(
    interventions: Sequence[Intervention | str] | Intervention | str,
    units: Units,
    optimizer: Optimizer,
    *,
    seeds: Sequence[int] | None = None,
    hooks: bool = True,
    targets: Sequence[nn.Module] = (),
) -> Handle:
    """Let methods act around every step of `optimizer`.

    Args:
        interventions: methods or specs (`"cbp:rate=1e-4"`); they act in the order of their `stage`.
        units: from `find_units`; those whose incoming weights this optimizer owns are acted on.
        optimizer: any torch optimizer.
        seeds: one per copy, names of their random streams; default 0, 1, ...
        hooks: act through the optimizer's step hooks. With False the loop itself calls
            `handle.before_step()` before and `handle.after_step()` after each step.
        targets: target networks, of the same structure as `units.model`: resets and the like jump
            them with it. Penalties and recycling leave them to follow.

    Attach before `torch.compile` and before capturing a CUDA graph.
    """
    if isinstance(interventions, Intervention | str):
        interventions = [interventions]
    made = [registry.make(i) if isinstance(i, str) else i for i in interventions]
    for intervention in made:
        if not isinstance(intervention, Intervention):
            raise ValueError(f"{intervention!r} is neither an Intervention nor a spec like 'cbp'")
    names = _names(made)
    order = sorted(range(len(made)), key=lambda place: made[place].stage)
    chosen = {names[i]: made[i] for i in order}
    return Handle(chosen, units, optimizer, seeds, hooks, targets)


class Handle:
    """Methods at work on one optimizer.

    Attributes:
        interventions: name -> method, in the order in which they act.
        observes: whether any needs activations of training forwards.
    """

    def __init__(
        self,
        interventions: Mapping[str, Intervention],
        units: Units,
        optimizer: Optimizer,
        seeds: Sequence[int] | None,
        hooks: bool,
        targets: Sequence[nn.Module] = (),
    ) -> None:
        _check_targets(units.model, targets)
        seeds = tuple(range(units.copies)) if seeds is None else tuple(seeds)
        if len(seeds) != units.copies:
            raise ValueError(f"{len(seeds)} seeds for {units.copies} copies; give one per copy")
        self.interventions = dict(interventions)
        self.optimizer = optimizer
        self.clock = Clock(seeds, units.device)
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        sites = [site for site in units if site.producer.module.weight in owned]
        self.units = units if len(sites) == len(units) else units.only(sites)
        self.observes = any(i.observes for i in self.interventions.values())
        for name, intervention in self.interventions.items():
            if hasattr(intervention, "clock"):
                raise ValueError(f"this {name!r} is attached already; make a new one per optimizer")
            intervention.targets = tuple(targets)
            if intervention.stage is Stage.OPTIMIZER:  # before anyone reads its settings
                intervention.bind(self.units, optimizer)
        self.moments = Moments(self.units, optimizer, self.clock)
        for name, intervention in self.interventions.items():
            keys = [draws.key_of(seed, name) for seed in seeds]
            intervention.clock, intervention.moments = self.clock, self.moments
            intervention.units = self.units
            intervention.company = tuple(self.interventions.values())
            intervention.register_buffer("key", torch.tensor(keys, device=units.device))
            intervention._keys = keys
            if intervention.stage is not Stage.OPTIMIZER:
                intervention.bind(self.units, optimizer)
        kinds = list(self.interventions.values())
        before = [i for i in kinds if type(i).before_step is not Intervention.before_step]
        self._before = sorted(before, key=lambda i: not i.reads_gradients)
        self._after = [i for i in kinds if type(i).after_step is not Intervention.after_step]
        self._hooks = []
        if hooks:
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: self.before_step()),
                optimizer.register_step_post_hook(lambda *_: self.after_step()),
            ]

    # ---- acting --------------------------------------------------------------------------------

    def before_step(self, active: Active = None) -> None:
        """After backward and clipping, before `optimizer.step`.

        active: copies that the step moves, as for `BatchedAdam.step`; the others stay as they are.
        """
        if not self._before and not self.moments.awake:
            return
        self.clock.choose(active)
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._act_before()
        else:  # entering it again costs as much as a small method
            self._act_before()

    def _act_before(self) -> None:
        for intervention in self._before:
            intervention.before_step()
        self.moments.before_step()

    def after_step(self, active: Active = None) -> None:
        """After `optimizer.step`, with the same `active`."""
        if not self.interventions:
            return
        self.clock.choose(active)
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._act_after()
        else:
            self._act_after()

    def _act_after(self) -> None:
        self.clock.tick()
        if self.moments.holding:
            self.moments.after_step()
        for intervention in self._after:
            intervention.after_step()

    def on_change(self, active: Active = None) -> None:
        """Tell the methods that the task changed, for all copies or those that are `active`."""
        self.clock.choose(active)
        with torch.no_grad():
            for intervention in self.interventions.values():
                intervention.on_change()

    def counts(self) -> dict[str, Tensor]:
        """Units recycled so far per copy, int64 `[S]`, of each method that recycles."""
        found = {}
        for name, intervention in self.interventions.items():
            replaced = getattr(intervention, "replaced", None)
            if isinstance(replaced, Tensor):
                found[name] = replaced
        return found

    def detach(self) -> None:
        """Stop acting (the activations' recorder belongs to the units: `units.close()`)."""
        for hook in self._hooks:
            hook.remove()
        for intervention in self.interventions.values():
            intervention._detached()
        self.moments.close()
        self._hooks, self._before, self._after = [], [], []

    # ---- state ---------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """All state, live, the copies axis first."""
        found = {"updates": self.clock.updates}
        found |= {f"moments.{key}": value for key, value in self.moments.tensors().items()}
        for name, intervention in self.interventions.items():
            found |= {f"{name}.{key}": value for key, value in intervention.state_dict().items()}
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """All state as plain tensors (clones)."""
        return {key: value.clone() for key, value in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()` of the same methods on the same wiring."""
        self._load(self._tensors(), state)

    def state_of(self, copy: int) -> dict[str, Tensor]:
        """One copy's state on the CPU, without the copies axis."""
        return {k: v[copy].detach().to("cpu", copy=True) for k, v in self._tensors().items()}

    def load_state_of(self, copy: int, state: Mapping[str, Tensor]) -> None:
        """Continue one copy from `state_of`, also that of another copy or process."""
        self._load({key: value[copy] for key, value in self._tensors().items()}, state)

    @torch.no_grad()
    def _load(self, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        if own.keys() != state.keys():
            lacking, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(
                f"the interventions' state does not fit: it lacks {lacking} and has {extra}; "
                f"attach the same methods as when it was saved"
            )
        for key, value in own.items():
            if value.shape != state[key].shape:
                raise ValueError(
                    f"{key} has shape {list(state[key].shape)} in the state to load and "
                    f"{list(value.shape)} here; attach to the same network and optimizer options"
                )
        for key, value in own.items():
            value.copy_(state[key])
        self.clock.reload()
        self.moments.reload()
        for intervention in self.interventions.values():
            intervention._keys = intervention.key.tolist()
            intervention._loaded()


def _check_targets(model: nn.Module, targets: Sequence[nn.Module]) -> None:
    """Targets have the model's parameters under the model's names."""
    own = {name: p.shape for name, p in model.named_parameters()}
    for target in targets:
        other = {name: p.shape for name, p in target.named_parameters()}
        for name in own.keys() | other.keys():
            if own.get(name) != other.get(name):
                raise ValueError(
                    f"{type(model).__name__} and its target differ in {name!r}: give targets of "
                    f"the same structure as the model of find_units"
                )


def _names(interventions: Sequence[Intervention]) -> list[str]:
    """Registry names, numbered where one occurs again: cbp, cbp-2."""
    names: list[str] = []
    for intervention in interventions:
        base = intervention.name or type(intervention).__name__.lower()
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names
