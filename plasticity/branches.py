"""Frozen copies of a network's last layers, run beside the live ones.

The live layers see the rows that they always saw; rows of the frozen copies travel beside them
along the batch, so that whatever stands between two layers of a head (functional nonlinearities,
flattening) runs once for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from perennial.plasticity import probe
from perennial.plasticity.fresh import Slot


class Frozen(nn.Module):
    """Parameters of frozen heads: buffers `theta<k>_<place>` and `twin<k>_<place>` `[S, ...]`, zero
    until injection k, so that heads not used yet give exactly 0.

    Attributes:
        used: pairs that are run.
    """

    def __init__(self, slots: Iterable[Slot], times: int) -> None:
        super().__init__()
        self.times, self.used = times, 0
        self.batched = False
        for slot in slots:
            self.batched = slot.batched
            for number in range(times):
                for kind in ("theta", "twin"):
                    self.register_buffer(
                        f"{kind}{number}_{slot.place}", torch.zeros_like(slot.lead)
                    )

    def pairs(self, place: int) -> list[tuple[Tensor, Tensor]]:
        """Theta and twin `[S, ...]` of one parameter, of every injection."""
        return [
            (self.get_buffer(f"theta{k}_{place}"), self.get_buffer(f"twin{k}_{place}"))
            for k in range(self.times)
        ]

    def same(self, other: Frozen) -> bool:
        """Whether both hold the same parameters."""
        own = {name: value.shape for name, value in self.named_buffers()}
        return own == {name: value.shape for name, value in other.named_buffers()}


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module.forward(x)


class Branches:
    """The hooks of one module of a head.

    Args:
        module: a layer, or a norm between two layers.
        frozen: the frozen parameters of all modules.
        places: names of the module's parameters -> their place in `frozen`.
        first: rows of the batch are repeated here, once per head.
        last: heads are added up here: `(live - twin) + theta`, so that equal live and twin leave
            theta exactly.
    """

    def __init__(
        self,
        module: nn.Module,
        frozen: Frozen,
        places: Mapping[str, int],
        *,
        first: bool,
        last: bool,
    ) -> None:
        self.bare, self.frozen, self.places = _Bare(module), frozen, dict(places)
        self.first, self.last = first, last
        self.rest: tuple[Tensor, ...] = ()
        self.handles = [
            # Before the recorder of activations: it sees the live rows.
            module.register_forward_pre_hook(self.split, prepend=True),
            module.register_forward_hook(self.join),
        ]

    def split(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Hand the live rows to the module, keep those of the frozen heads."""
        count = 0 if probe.probing() else 2 * self.frozen.used
        if not count:
            self.rest = ()
            return None
        if self.first:
            self.rest = (inputs[0],) * count
            return None
        live, *rest = inputs[0].chunk(1 + count, 1 if self.frozen.batched else 0)
        self.rest = tuple(rest)
        return (live, *inputs[1:])

    def join(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Any:
        """Run the frozen heads; add up, or send all rows on."""
        rest, self.rest = self.rest, ()
        if not rest:
            return None
        outputs = []
        for turn, x in enumerate(rest):
            number, kind = divmod(turn, 2)
            outputs.append(functional_call(self.bare, self._weights(number, kind), (x,)))
        if not self.last:
            return torch.cat([output, *outputs], 1 if self.frozen.batched else 0)
        for number in reversed(range(len(outputs) // 2)):
            theta, twin = outputs[2 * number : 2 * number + 2]
            output = (output - twin) + theta
        return output

    def _weights(self, number: int, kind: int) -> dict[str, Tensor]:
        found = {}
        for name, place in self.places.items():
            value = self.frozen.pairs(place)[number][kind]
            found[f"module.{name}"] = value if self.frozen.batched else value[0]
        return found

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def branches_of(module: nn.Module) -> list[Branches]:
    """Those on a module."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Branches)]
