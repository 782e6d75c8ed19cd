"""Parameters as at their birth: drawn anew in place, for the copies that it concerns.

Weights and biases of linear and convolutional layers are drawn as their layer was initialised
(its `init`; without one, as torch draws by default). Gains of norms are 1, their offsets 0.
Anything else (log standard deviations, scalers) returns to its value when the method was attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity.architecture import is_norm
from perennial.plasticity.draws import Stream
from perennial.plasticity.surgery import fresh_rows
from perennial.plasticity.units import Layer, Units


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter of the model that the optimizer owns.

    Attributes:
        place: among all parameters of the model; names its stream of random numbers.
        kind: "weight" or "bias" of a layer, "gain" or "offset" of a norm, "other".
        batched: whether the tensor carries the copies axis.
        layer: whose weight or bias it is; None for norms and others.
        targets: the same parameter in each target network.
    """

    name: str
    place: int
    kind: str
    parameter: Tensor
    batched: bool
    layer: Layer | None
    targets: tuple[Tensor, ...]

    @property
    def lead(self) -> Tensor:
        """The parameter with the copies axis first: a view that may be written to."""
        return lead(self.parameter, self.batched)

    @property
    def target_leads(self) -> list[Tensor]:
        """The same of the target networks."""
        return [lead(target, self.batched) for target in self.targets]


def slots_of(units: Units, optimizer: Optimizer, targets: Sequence[nn.Module] = ()) -> list[Slot]:
    """All parameters of the model that this optimizer owns, in the model's order; those that copies
    of a batched model share are left out."""
    owned = set(parameters_of(optimizer))
    layers = {layer.module: layer for layer in units.layers}
    others = [dict(target.named_parameters()) for target in targets]
    slots = []
    for place, (name, parameter) in enumerate(units.model.named_parameters()):
        if parameter not in owned:
            continue
        if units.batched and (parameter.ndim == 0 or len(parameter) != units.copies):
            continue
        path, _, last = name.rpartition(".")
        module = units.model.get_submodule(path)
        layer = layers.get(module) if last in ("weight", "bias") else None
        kind = last if layer is not None else "other"
        if is_norm(module) and last in ("weight", "bias"):
            kind = {"weight": "gain", "bias": "offset"}[last]
        same = tuple(other[name] for other in others)
        slots.append(Slot(name, place, kind, parameter, units.batched, layer, same))
    return slots


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of the optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def lead(tensor: Tensor, batched: bool) -> Tensor:
    """`[S, ...]`, a view that may be written to."""
    tensor = tensor.detach()
    return tensor if batched else tensor.unsqueeze(0)


def fresh(slot: Slot, stream: Stream) -> Tensor:
    """New initial values `[S, ...]` of a weight, bias, gain or offset, in its dtype."""
    value, layer = slot.lead, slot.layer
    if slot.kind == "gain":
        return torch.ones_like(value)
    if layer is None:
        return torch.zeros_like(value)
    stream = stream.fold(slot.place + 1)
    if slot.kind == "weight":
        return _weight(layer, stream)
    bound = layer.init.bias_bound(layer.fan_in)
    if not bound:
        return torch.zeros_like(value)
    draw = stream.uniform(value[0].numel()).view_as(value)
    return ((2 * draw - 1) * bound).to(value.dtype)


def _weight(layer: Layer, stream: Stream) -> Tensor:
    """A fresh weight `[S, out, in, ...]`; orthogonal ones as a whole, as `nn.init.orthogonal_`."""
    weight, init = layer.weight, layer.init
    copies, rows = weight.shape[:2]
    if init.kind != "orthogonal":
        return fresh_rows(layer, init, stream, rows).view_as(weight)
    tall, wide = max(rows, layer.fan_in), min(rows, layer.fan_in)
    q, r = torch.linalg.qr(stream.normal(tall * wide).view(copies, tall, wide))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over rotations
    q = q if rows >= layer.fan_in else q.mT
    return (q * init.gain).to(weight.dtype).reshape(weight.shape)


def put(value: Tensor, new: Tensor | float, due: Tensor) -> None:
    """Write `new` into `value` `[S, ...]` in place, where `due` `[S]`; the rest keeps every bit."""
    value.copy_(torch.where(due.view(-1, *[1] * (value.ndim - 1)), new, value))


def restore_statistics(
    model: nn.Module, slots: Iterable[Slot], due: Tensor, targets: Sequence[nn.Module] = ()
) -> None:
    """Running statistics of norms that own one of the parameters: mean 0, variance 1, count 0."""
    paths = {slot.name.rpartition(".")[0] for slot in slots if slot.kind in ("gain", "offset")}
    for path in sorted(paths):
        for network in (model, *targets):
            module = network.get_submodule(path)
            for name, start in (
                ("running_mean", 0),
                ("running_var", 1),
                ("num_batches_tracked", 0),
            ):
                value = getattr(module, name, None)
                if isinstance(value, Tensor):
                    put(value if len(due) > 1 else value.unsqueeze(0), start, due)


def forget(
    optimizer: Optimizer, parameters: Iterable[Tensor], due: Tensor, *, averages: bool = True
) -> None:
    """The optimizer's state of these parameters as before their first step, where `due` `[S]`.

    Args:
        averages: zero moments and momentum too; False only restarts the step count.

    Stock optimizers keep one step count per tensor: it restarts when all copies are due. There is
    no state before the first step.
    """
    copies = len(due)
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                continue
            if key == "step" or (averages and value.shape == parameter.shape):
                where = due.to(value.device)  # stock step counts live on the CPU
                if copies > 1 and value.ndim and len(value) == copies:
                    put(value, 0.0, where)
                else:
                    put(value.unsqueeze(0), 0.0, where.all().unsqueeze(0))
