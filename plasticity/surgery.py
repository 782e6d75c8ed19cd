"""Recycling units: fresh incoming weights, silent outgoing weights, clean norms and moments.

The units to recycle are a fixed number of slots per copy with a flag each (`Selection`), never a
list
whose length depends on values: nothing here asks the device anything, shapes never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perennial.plasticity import draws
from perennial.plasticity.copies import Init
from perennial.plasticity.units import Layer, Site

if TYPE_CHECKING:
    from perennial.plasticity.moments import Moments


@dataclass(frozen=True, eq=False)
class Selection:
    """Units of one site: slot j of copy s is unit `index[s, j]`, recycled where `chosen[s, j]`.

    The units of one copy's slots are distinct.
    """

    position: int  # of the site among the units' sites
    site: Site
    index: Tensor  # int64 [S, K]
    chosen: Tensor  # bool [S, K]

    @staticmethod
    def from_mask(position: int, site: Site, mask: Tensor) -> Selection:
        """All units of the site as slots, recycled where `mask` `[S, n]`."""
        index = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
        return Selection(position, site, index, mask)

    def count(self) -> Tensor:
        """How many units of each copy: int64 `[S]`."""
        return self.chosen.sum(-1)


def recycle(
    selections: Sequence[Selection],
    key: Tensor,
    moments: Moments,
    *,
    treatment: str = "exact",
    means: Sequence[Tensor] | None = None,
) -> None:
    """Give the selected units of all sites a new life.

    Incoming weights are drawn anew as the layer was initialised, the bias returns to its initial
    value (zero, or a fresh draw where torch's default drew it), a norm's gain and offset to 1 and
    0, outgoing weights to zero. Where both ends of a weight are recycled it is zero.

    Args:
        selections: at most one per site; all chosen before any weight changes.
        key: int64 `[S]`, key of the random rows of this event.
        moments: the optimizer's state of the same units.
        treatment: what happens to it, see `Moments.recycled`.
        means: mean activation `[S, n, k]` per selection: the consumers' biases take over what the
            units gave on average. None leaves them.

    Source: Dohare et al. 2024 (Nature 632); the published code's compensation has no effect because
    it clears the mean first, and it keeps norms and biases of consumers as they are.
    """
    if means is not None:
        for selection, mean in zip(selections, means, strict=True):
            _compensate(selection, mean)
    for selection in selections:
        _renew(selection, draws.fold(key, selection.position + 1))
    for selection in selections:  # after all fresh rows: zero wins
        for consumer in selection.site.consumers:
            index, chosen = _column_slots(selection, consumer.columns.table)
            set_slots(consumer.layer.weight, 2, index, chosen, 0.0)
    for selection in selections:
        moments.recycled(selection, treatment)


def set_slots(
    tensor: Tensor, dim: int, index: Tensor, chosen: Tensor, value: Tensor | float
) -> None:
    """Write `value` (or slots along `dim`) where chosen: tensor `[S, ...]`, index and chosen `[S,
    K]`."""
    shape = [index.shape[0], *[1] * (tensor.ndim - 1)]
    shape[dim] = index.shape[1]
    full = list(tensor.shape)
    full[dim] = index.shape[1]
    where = index.view(shape).expand(full)
    old = tensor.gather(dim, where)
    tensor.scatter_(dim, where, torch.where(chosen.view(shape), value, old).to(tensor.dtype))


def column_slots(index: Tensor, chosen: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of units as slots of a consumer's input features, `[S, K * k]`; table `[n, k]`."""
    columns = table[index]  # [S, K, k]
    return columns.flatten(1), chosen.unsqueeze(-1).expand_as(columns).flatten(1)


def _column_slots(selection: Selection, table: Tensor) -> tuple[Tensor, Tensor]:
    return column_slots(selection.index, selection.chosen, table)


def _compensate(selection: Selection, mean: Tensor) -> None:
    """Consumers' biases take over the mean contribution of the units that go."""
    for consumer in selection.site.consumers:
        bias, weight = consumer.layer.bias, consumer.layer.weight
        if bias is None:
            continue
        columns, chosen = _column_slots(selection, consumer.columns.table)
        k = consumer.columns.k
        given = mean if mean.shape[-1] == k else mean.mean(-1, keepdim=True).expand(-1, -1, k)
        slots = selection.index.unsqueeze(-1).expand(-1, -1, k)
        amount = torch.where(chosen, given.gather(1, slots).flatten(1), 0.0)  # [S, K * k]
        if weight.ndim > 3:
            weight = weight.flatten(3).sum(-1)
        where = columns.unsqueeze(1).expand(-1, weight.shape[1], -1)
        bias.add_((weight.gather(2, where) * amount.unsqueeze(1)).sum(-1))


def _renew(selection: Selection, key: Tensor) -> None:
    """Fresh incoming weights, initial bias, neutral norm."""
    site, index, chosen = selection.site, selection.index, selection.chosen
    layer = site.producer
    weight, bias = layer.weight, layer.bias
    rows = fresh_rows(layer, layer.init, draws.fold(key, 1), index.shape[1])
    set_slots(weight, 1, index, chosen, rows.view(*index.shape, *weight.shape[2:]).to(weight.dtype))
    if bias is not None:
        bound = layer.init.bias_bound(layer.fan_in)
        value: Tensor | float = 0.0
        if bound:
            draw = draws.uniform(draws.fold(key, 2), index.shape[1])
            value = ((2 * draw - 1) * bound).to(bias.dtype)
        set_slots(bias, 1, index, chosen, value)
    for norm in site.norms:
        for name, neutral in (
            ("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0),
        ):  # fmt: skip
            tensor = getattr(norm, name, None)
            if isinstance(tensor, Tensor):
                tensor = tensor.detach()
                lead = tensor if tensor.ndim == 2 else tensor.unsqueeze(0)
                set_slots(lead, 1, index, chosen, neutral)


def fresh_rows(layer: Layer, init: Init, key: Tensor, count: int) -> Tensor:
    """`count` fresh incoming rows per copy, float64 `[S, count, fan_in]`; key `[S]`.

    Uniform kinds keep the fan of the whole tensor. A row of an orthogonal matrix is the first
    fan_in entries of a random direction in max(out, fan_in) dimensions: drawn exactly so.
    """
    fan_in = layer.fan_in
    if init.kind == "zeros":
        return torch.zeros(len(key), count, fan_in, dtype=torch.float64, device=key.device)
    if init.kind == "orthogonal":
        size = max(layer.weight.shape[1], fan_in)
        direction = draws.normal(key, count * size).view(len(key), count, size)
        length = direction.square().sum(-1, keepdim=True).sqrt()
        return direction[..., :fan_in] * (init.gain / length)
    bound = init.bound(fan_in, layer.fan_out)
    return (2 * draws.uniform(key, count * fan_in).view(len(key), count, fan_in) - 1) * bound
