"""What distances are measured from: earlier weights and pre-activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from perennial.plasticity.units import Layer, Site


class References:
    """Weights when the units were found and when they were last measured, and each unit's
    pre-activations when they were first measured. `metrics.measure` compares with them.

    Save `state_of` with a checkpoint, so that metrics go on as if there had been no stop. Every
    tensor carries the copies axis first.

    Args:
        layers, sites: of the units.
    """

    def __init__(self, layers: Sequence[Layer], sites: Sequence[Site]) -> None:
        self.initial = {layer.key: layer.weight.clone() for layer in layers}
        self.latest = {key: weight.clone() for key, weight in self.initial.items()}
        # Mean and standard deviation of pre-activations, `[S, 2, n]`; inf: not measured yet.
        self.before = {
            site.key: site.producer.weight.new_full(
                (len(site.producer.weight), 2, site.n), torch.inf
            )
            for site in sites
        }

    def compare(self, site: Site) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation `[S, n]` of the pre-activations when first measured; these
        become so now if there were none. None where there are none now."""
        if site.preactivation is None:
            return None
        before, now = self.before[site.key], torch.stack(site.preactivation, 1)
        before.copy_(torch.where(before.isinf(), now, before))
        return before[:, 0], before[:, 1]

    def _tensors(self) -> dict[str, Tensor]:
        kinds = {"initial": self.initial, "latest": self.latest, "before": self.before}
        return {f"{kind}.{key}": t for kind, held in kinds.items() for key, t in held.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """All of it (clones)."""
        return {key: value.clone() for key, value in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()` of the same network."""
        self._load(self._tensors(), state)

    def state_of(self, copy: int) -> dict[str, Tensor]:
        """One copy's part on the CPU, without the copies axis."""
        return {k: v[copy].detach().to("cpu", copy=True) for k, v in self._tensors().items()}

    def load_state_of(self, copy: int, state: Mapping[str, Tensor]) -> None:
        """Continue one copy from `state_of`, also that of another copy or process."""
        self._load({key: value[copy] for key, value in self._tensors().items()}, state)

    @staticmethod
    def _load(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        wrong = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
        if wrong:
            raise ValueError(f"the metrics' references to load do not fit this network: {wrong}")
        for key, value in own.items():
            value.copy_(state[key])
