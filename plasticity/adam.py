"""Adam for networks with a copies axis: a step count per copy, and copies that can stand still."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from perennial.plasticity import kernels
from perennial.plasticity.adam_loops import Beside, Loops
from perennial.plasticity.aging import Aging
from perennial.plasticity.flat import flatten

Active = Sequence[int] | Sequence[bool] | Tensor | None


class BatchedAdam(Optimizer):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980) whose parameters all carry the copies axis first.

    Equal to `torch.optim.Adam` on each copy alone. `torch.optim.Adam` keeps one step count per
    tensor, so it cannot leave one copy out of a step: a zero gradient still moves weights by their
    momentum. Here `state[p]["step"]` has shape `[S]` and `step(active=...)` leaves weights,
    moments and step of the other copies untouched, bit for bit.

    Args:
        params: parameters or parameter groups; every parameter is `[S, ...]` with the same S.
        lr: learning rate; a 0-dim tensor may be given where a CUDA graph must see it change.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the square root of the second moment.
        weight_decay: coupled L2, as in `torch.optim.Adam`: added to the gradient.

    On the CPU the step is one loop over all copies of a parameter (kernels.py), on a GPU torch's
    own fused kernel over one view per copy; a plain elementwise path serves devices and dtypes
    without either, and masks that live on the device.

    Attributes:
        aging: set by who knows that parts of the network are younger than it (moments.py): they
            take the step of their age. Heeded only where `compiled`.
    """

    _table: list[_Group] | None = None
    _compiled = False
    aging: Aging | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(lr, Tensor) and not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr={lr} must be finite and not negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={tuple(betas)} must both lie in [0, 1)")
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps={eps} must be finite and not negative")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay={weight_decay} must be finite and not negative")
        super().__init__(
            params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        )
        self.copies = _count_copies(self.param_groups)
        flatten(self._parameters())

    def keep_gradients(self) -> None:
        """Give every parameter a gradient that stays, to be written to and never replaced: on the
        CPU all in one memory, as the weights are."""
        params = self._parameters()
        for p in params:
            p.grad = torch.zeros_like(p)
        grads = [p.grad for p in params if p.grad is not None]
        flatten(grads)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._table = None  # views of the old state
        self.copies = _count_copies(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._table = None

    def step(self, active: Active = None) -> None:  # type: ignore[override]
        """Move the active copies by one step.

        Args:
            active: which copies move: None for all, their indices, a list of S bools, or a bool
                tensor `[S]` (on a GPU it is applied as a mask, without asking the device).
        """
        self.move(active)

    def move(self, active: Active = None, beside: Beside | None = None) -> None:
        """`step` without torch's wrapper, which runs step hooks and costs 14 us a call on CPU.

        beside: runs two lists of calls at the same time, for steps in two threads; heeded where
            `compiled`.
        """
        copies, mask = self._chosen(active)
        if self.aging is not None and self.compiled:
            self.aging.look_up()
        for group, options in zip(self._groups(), self.param_groups, strict=True):
            group.step(options, copies, mask, self.aging, beside)

    @property
    def compiled(self) -> bool:
        """Whether steps run in our own loops (kernels.py), as far as known from the last one."""
        if self._table is None:
            self._groups()
        return self._compiled and not torch.compiler.is_compiling()

    def prepare(self) -> None:
        """Allocate the state now instead of at the first step: before a CUDA graph, or before
        threads move copies of their own."""
        for group in self._groups():
            group.prepare()

    def state_of(self, copy: int) -> dict[str, Tensor]:
        """This copy's moments and step counts (clones), named `<parameter index>.<key>`."""
        self._groups()
        return {
            f"{index}.{key}": self.state[p][key][copy].clone()
            for index, p in enumerate(self._parameters())
            for key in ("step", "exp_avg", "exp_avg_sq")
        }

    def load_state_of(self, copy: int, state: dict[str, Tensor]) -> None:
        """Write what `state_of` returned, also that of another copy or of another process."""
        self._groups()
        for index, p in enumerate(self._parameters()):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                name, target = f"{index}.{key}", self.state[p][key][copy]
                if name not in state or state[name].shape != target.shape:
                    raise ValueError(f"the Adam state to load lacks {name} {list(target.shape)}")
                target.copy_(state[name])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _groups(self) -> list[_Group]:
        table = self._table
        if table is None or not all(group.current() for group in table):
            table = [_Group(group["params"], self.state) for group in self.param_groups]
            self._table, self._compiled = table, all(group.compiled for group in table)
        return table

    def _chosen(self, active: Active) -> tuple[tuple[int, ...], Tensor | None]:
        """The copies to move as host integers, or a mask on the device."""
        if active is None:
            return tuple(range(self.copies)), None
        if isinstance(active, Tensor):
            if active.shape != (self.copies,) or active.dtype is not torch.bool:
                raise ValueError(f"active must be a bool tensor of shape [{self.copies}]")
            if active.device.type != "cpu":
                return (), active
            active = active.tolist()
        if any(isinstance(entry, bool) for entry in active):
            if len(active) != self.copies:
                raise ValueError(f"active has {len(active)} bools for {self.copies} copies")
            return tuple(copy for copy, moves in enumerate(active) if moves), None
        if not all(0 <= copy < self.copies for copy in active):
            raise ValueError(f"active={list(active)} must name copies 0 to {self.copies - 1}")
        return tuple(sorted(set(active))), None


class _Group:
    """Cached tensors of one parameter group: nothing is collected or sorted while stepping."""

    def __init__(self, params: list[Tensor], state: dict[Tensor, dict[str, Any]]) -> None:
        self.params = params
        self.count = len(params)
        self.copies = params[0].shape[0]
        self.pointers = [p.data_ptr() for p in params]
        first = params[0]
        # One row of step counts per parameter, so that one addition advances them all.
        self.steps = torch.zeros(self.count, self.copies, device=first.device)
        self.weights = [p.detach() for p in params]
        self.exp_avgs: list[Tensor] = []
        self.exp_avg_sqs: list[Tensor] = []
        for index, p in enumerate(params):
            entry = state[p]
            if "step" in entry:
                self.steps[index].copy_(torch.as_tensor(entry["step"]))
            else:
                for key in ("exp_avg", "exp_avg_sq"):
                    entry[key] = torch.zeros_like(p, memory_format=torch.contiguous_format).detach()
            entry["step"] = self.steps[index]
            self.exp_avgs.append(entry["exp_avg"])
            self.exp_avg_sqs.append(entry["exp_avg_sq"])
        flatten(self.exp_avgs)
        flatten(self.exp_avg_sqs)
        self.fused = all(
            p.is_floating_point()
            and p.is_contiguous()
            and p.device == first.device
            and p.device.type in ("cpu", "cuda")
            for p in params
        )
        self.compiled = kernels.ready(*params, *self.exp_avgs, *self.exp_avg_sqs)
        self.grads: list[Tensor | None] = [None] * self.count
        self.loops = Loops(params, self.exp_avgs, self.exp_avg_sqs, self.steps)
        self.fused_args: list[tuple[list[Tensor], ...]] = []
        self.increments: dict[tuple[int, ...], Tensor] = {}

    def current(self) -> bool:
        """Whether the cached views still are the parameters (`module.to` moves their storage)."""
        if torch.compiler.is_compiling():
            return True
        return self.count == len(self.params) and self.pointers == [
            p.data_ptr() for p in self.params
        ]

    def prepare(self) -> None:
        """Lay out what steps in loops need of the present gradients."""
        if self.compiled:
            self.loops.lay_out([p.grad for p in self.params])

    def step(
        self,
        options: dict[str, Any],
        copies: tuple[int, ...],
        mask: Tensor | None,
        aging: Aging | None = None,
        beside: Beside | None = None,
    ) -> None:
        grads = [p.grad for p in self.params]
        present = [index for index, grad in enumerate(grads) if grad is not None]
        if not present or (mask is None and not copies):
            return
        # A compiler fuses the elementwise path itself and cannot trace the kernel over views.
        if mask is None and self.compiled and not torch.compiler.is_compiling():
            self.loops.step(grads, options, copies, aging, beside)
            return
        self._advance(present, copies, mask)
        if mask is None and self.fused and not torch.compiler.is_compiling():
            self._collect(grads, present)
            lr, (beta1, beta2) = options["lr"], options["betas"]
            for copy in copies:
                weights, gradients, means, squares, steps = self.fused_args[copy]
                torch._fused_adam_(
                    weights,
                    gradients,
                    means,
                    squares,
                    [],
                    steps,
                    lr=lr,
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=options["weight_decay"],
                    eps=options["eps"],
                    amsgrad=False,
                    maximize=False,
                )
            return
        if mask is None and len(copies) < self.copies:
            chosen = [copy in copies for copy in range(self.copies)]
            mask = torch.tensor(chosen, device=self.steps.device)
        for index in present:
            grad = grads[index]
            assert grad is not None
            self._elementwise(index, grad, options, mask)

    def _advance(self, present: list[int], copies: tuple[int, ...], mask: Tensor | None) -> None:
        """Count the step, for the copies that move and the parameters that have a gradient."""
        increment: float | Tensor = 1.0
        if mask is not None:
            increment = mask.to(self.steps.dtype)
        elif len(copies) < self.copies:
            if copies not in self.increments:
                row = [float(copy in copies) for copy in range(self.copies)]
                self.increments[copies] = torch.tensor(row, device=self.steps.device)
            increment = self.increments[copies]
        if len(present) == self.count:
            self.steps.add_(increment)
        else:
            for index in present:
                self.steps[index].add_(increment)

    def _collect(self, grads: list[Tensor | None], present: list[int]) -> None:
        """Per-copy views for the fused kernel, made anew only when gradients are new tensors."""
        if self.fused_args and all(a is b for a, b in zip(grads, self.grads, strict=True)):
            return
        # The kernel reads raw memory: it must see gradients laid out as the weights are.
        dense = [grad.detach().contiguous() for grad in grads if grad is not None]
        columns = (
            [self.weights[index] for index in present],
            dense,
            [self.exp_avgs[index] for index in present],
            [self.exp_avg_sqs[index] for index in present],
            [self.steps[index] for index in present],
        )
        if self.copies == 1:
            self.fused_args = [columns]
        else:
            self.fused_args = [
                tuple([tensor[copy] for tensor in column] for column in columns)
                for copy in range(self.copies)
            ]
        # A made-contiguous gradient is a copy of this step's values: do not keep it.
        same = all(a is None or a.is_contiguous() for a in grads)
        self.grads = list(grads) if same else [None] * self.count

    def _elementwise(
        self, index: int, grad: Tensor, options: dict[str, Any], mask: Tensor | None
    ) -> None:
        """The same step written out; inactive copies keep every bit (`where`, not times zero)."""
        beta1, beta2 = options["betas"]
        weight, exp_avg, exp_avg_sq = (
            self.weights[index],
            self.exp_avgs[index],
            self.exp_avg_sqs[index],
        )
        grad = grad.detach()
        if options["weight_decay"] != 0:
            grad = grad.add(weight, alpha=options["weight_decay"])
        shape = (self.copies,) + (1,) * (weight.ndim - 1)
        steps = self.steps[index].double().view(shape)
        correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
        mean = torch.lerp(exp_avg, grad, 1 - beta1)
        square = (exp_avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = square.sqrt() / correction2.sqrt().to(square.dtype)
        rate = (options["lr"] / correction1).to(weight.dtype)
        moved = weight - rate * (mean / denominator.add_(options["eps"]))
        if mask is None:
            results = (moved, mean, square)
        else:
            keep = mask.view(shape)
            results = (
                torch.where(keep, moved, weight),
                torch.where(keep, mean, exp_avg),
                torch.where(keep, square, exp_avg_sq),
            )
        for target, value in zip((weight, exp_avg, exp_avg_sq), results, strict=True):
            target.copy_(value)


def _count_copies(param_groups: list[dict[str, Any]]) -> int:
    """S, shared by all parameters; an error names the first that differs."""
    sizes = [tuple(p.shape) for group in param_groups for p in group["params"]]
    if any(not size for size in sizes):
        raise ValueError("BatchedAdam got a 0-dim parameter; every parameter must be [copies, ...]")
    copies = sizes[0][0]
    for size in sizes:
        if size[0] != copies:
            raise ValueError(
                f"BatchedAdam got shapes {list(sizes[0])} and {list(size)}: "
                f"{copies} and {size[0]} copies; give each parameter the same copies axis"
            )
    return copies
