"""Recycling units: fresh incoming weights, silent outgoing weights, clean norms and moments.

The units to recycle are a fixed number of slots per copy with a flag each (`Selection`), never a
list whose length depends on values: nothing here asks the device anything, shapes never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perennial.plasticity import kernels
from perennial.plasticity.copies import Init
from perennial.plasticity.draws import Stream
from perennial.plasticity.units import Columns, Layer, Site

if TYPE_CHECKING:
    from perennial.plasticity.moments import Moments


class Selection:
    """Units of one site: slot j of copy s is unit `index[s, j]`, recycled where `chosen[s, j]`.

    Attributes:
        position: of the site among the units' sites.
        index: int64 `[S, K]`; the slots of one copy are distinct units.
        chosen: bool `[S, K]`.
        count: how many units of each copy, int64 `[S]`.
        gone: 1 for units that are recycled, else 0: `[S, n]`, dtype of the weights.
        kept: 1 - gone.
    """

    def __init__(self, position: int, site: Site, index: Tensor, chosen: Tensor) -> None:
        self.position, self.site, self.index, self.chosen = position, site, index, chosen
        weight = site.producer.module.weight
        self.count = chosen.sum(-1)
        zeros = weight.new_zeros(len(index), site.n)
        self.gone = zeros.scatter_(1, index, chosen.to(weight.dtype))
        self.kept = 1 - self.gone

    @staticmethod
    def from_mask(position: int, site: Site, mask: Tensor) -> Selection:
        """All units of the site as slots, recycled where `mask` `[S, n]`."""
        index = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
        return Selection(position, site, index, mask)


def recycle(
    selections: Sequence[Selection],
    stream: Stream,
    moments: Moments,
    *,
    treatment: str = "exact",
    means: Sequence[Tensor] | None = None,
    init: Init | None = None,
) -> None:
    """Give the selected units of all sites a new life.

    Incoming weights are drawn anew as the layer was initialised, the bias returns to its initial
    value (zero, or a fresh draw where torch's default drew it), a norm's gain and offset to 1 and
    0, outgoing weights to zero. Where both ends of a weight are recycled it is zero.

    Args:
        selections: at most one per site; all chosen before any weight changes.
        stream: random numbers of this event.
        moments: the optimizer's state of the same units.
        treatment: what happens to it, see `Moments.recycled`.
        means: mean activation `[S, n, k]` per selection: the consumers' biases take over what the
            units gave on average. None leaves them.
        init: how to draw; None for each layer's own.

    Source: Dohare et al. 2024 (Nature 632). Their code's compensation has no effect, because it
    clears the mean first.
    """
    if means is not None:
        for selection, mean in zip(selections, means, strict=True):
            _compensate(selection, mean)
    for selection in selections:
        _renew(selection, stream.fold(selection.position + 1), init)
    for selection in selections:  # after all fresh rows: zero wins
        for consumer in selection.site.consumers:
            silence_columns(consumer.layer.weight, consumer.columns, selection.kept)
    for selection in selections:
        moments.recycled(selection, treatment)


def set_slots(tensor: Tensor, index: Tensor, chosen: Tensor, value: Tensor | float) -> None:
    """Write slots of `value` `[S, K, ...]` into axis 1 of `tensor` `[S, n, ...]` where chosen."""
    tail = [1] * (tensor.ndim - 2)
    where = index.view(*index.shape, *tail).expand(*index.shape, *tensor.shape[2:])
    fresh = torch.where(chosen.view(*chosen.shape, *tail), value, tensor.gather(1, where))
    tensor.scatter_(1, where, fresh.to(tensor.dtype))


def silence_rows(tensor: Tensor, kept: Tensor) -> None:
    """Zero the rows `[S, n, ...]` of units with kept `[S, n]` = 0.

    Without compiled loops the whole tensor is multiplied: cheaper than gathering and scattering up
    to large sizes, and never more than a part of the optimizer's own pass.
    """
    if _by_loop(tensor, kept):
        kernels.clear_rows(kernels.array(tensor).reshape(*kept.shape, -1), kernels.array(kept))
        return
    tensor.mul_(kept.view(*kept.shape, *[1] * (tensor.ndim - 2)))


def silence_columns(tensor: Tensor, columns: Columns, kept: Tensor) -> None:
    """Zero the input features of `tensor` `[S, out, in, ...]` that belong to units not kept."""
    features = columns.scatter(kept.unsqueeze(-1), tensor.shape[2], 1.0)
    if _by_loop(tensor, features):
        array = kernels.array(tensor).reshape(*tensor.shape[:3], -1)
        kernels.clear_columns(array, kernels.array(features))
        return
    tensor.mul_(features.view(len(kept), 1, -1, *[1] * (tensor.ndim - 3)))


def _by_loop(*tensors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and kernels.ready(*tensors)


def _compensate(selection: Selection, mean: Tensor) -> None:
    """Consumers' biases take over the mean contribution of the units that go."""
    amount = mean * selection.gone.unsqueeze(-1)
    for consumer in selection.site.consumers:
        bias, weight = consumer.layer.bias, consumer.layer.weight
        if bias is None:
            continue
        given = amount
        if given.shape[-1] != consumer.columns.k:  # consumers that read the units differently
            given = given.mean(-1, keepdim=True)
        if weight.ndim > 3:
            weight = weight.flatten(3).sum(-1)
        features = consumer.columns.scatter(given, weight.shape[2], 0.0)
        bias.add_(torch.bmm(weight, features.unsqueeze(-1)).squeeze(-1))


def _renew(selection: Selection, stream: Stream, init: Init | None) -> None:
    """Fresh incoming weights, initial bias, neutral norm."""
    site, index, chosen = selection.site, selection.index, selection.chosen
    layer = site.producer
    weight, bias, init = layer.weight, layer.bias, init or layer.init
    rows = fresh_rows(layer, init, stream.fold(1), index.shape[1])
    set_slots(weight, index, chosen, rows.view(*index.shape, *weight.shape[2:]))
    if bias is not None:
        silence_rows(bias, selection.kept)
        bound = init.bias_bound(layer.fan_in)
        if bound:
            draw = stream.fold(2).uniform(index.shape[1])
            set_slots(bias, index, chosen, (2 * draw - 1) * bound)
    for norm in site.norms:
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(norm, name, None)
            if isinstance(tensor, Tensor):
                lead = tensor.detach() if tensor.ndim == 2 else tensor.detach().unsqueeze(0)
                lead.mul_(selection.kept)
                if name in ("weight", "running_var"):
                    lead.add_(selection.gone)


def fresh_rows(layer: Layer, init: Init, stream: Stream, count: int) -> Tensor:
    """`count` fresh incoming rows per copy, in the dtype of the weight: `[S, count, fan_in]`.

    Uniform kinds keep the fan of the whole tensor. A row of an orthogonal matrix is the first
    fan_in entries of a random direction in max(out, fan_in) dimensions: drawn exactly so.
    """
    fan_in, weight = layer.fan_in, layer.weight
    copies = weight.shape[0]
    if init.kind == "zeros":
        return weight.new_zeros(copies, count, fan_in)
    if init.kind == "orthogonal":
        size = max(weight.shape[1], fan_in)
        direction = stream.normal(count * size).view(copies, count, size)
        length = direction.square().sum(-1, keepdim=True).sqrt()
        return (direction[..., :fan_in] * (init.gain / length)).to(weight.dtype)
    bound = init.bound(fan_in, layer.fan_out)
    draw = stream.uniform(count * fan_in).view(copies, count, fan_in)
    return ((2 * draw - 1) * bound).to(weight.dtype)
