"""The losses of one PPO update, kept minibatch by minibatch and reduced once at its end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from perennial.agents.distributions import SurrogateGradient, surrogate_losses


class Tally:
    """Log ratios and value losses of every minibatch; what a minibatch adds is two copies."""

    def __init__(self, copies: int, epochs: int, minibatches: int, size: int, like: Tensor):
        self.log_ratios = like.new_zeros(epochs, minibatches, copies, size)
        self.value_losses = torch.zeros_like(self.log_ratios)
        self.advantages = torch.zeros_like(self.log_ratios)
        self.entropies = like.new_zeros(epochs, minibatches, copies)
        self.seen = np.zeros(copies, np.int64)  # minibatches of each seed before it stopped
        self.epoch, self.k = -1, 0

    def start_epoch(self, advantages: Tensor) -> None:
        """Take the advantages [S, n] of an epoch, in its order."""
        self.epoch, self.k = self.epoch + 1, 0
        shape = self.advantages.shape
        by_minibatch = advantages.view(shape[2], shape[1], shape[3])
        self.advantages[self.epoch] = by_minibatch.transpose(0, 1)

    def add(self, step: SurrogateGradient, value_loss: Tensor, active: Sequence[bool]) -> None:
        """Take one minibatch; it counts for the seeds that are `active`."""
        self.log_ratios[self.epoch, self.k] = step.log_ratio
        self.value_losses[self.epoch, self.k] = value_loss
        self.entropies[self.epoch, self.k] = step.entropy
        self.seen += active
        self.k += 1

    def losses(self, clip_range: float, ent_coef: float, vf_coef: float) -> dict[str, np.ndarray]:
        """Means [S] over the minibatches that each seed has seen; `loss` is the last one's."""
        parts = surrogate_losses(self.log_ratios, self.advantages, clip_range)
        parts["value_loss"] = self.value_losses.mean(-1)
        parts["entropy_loss"] = -self.entropies
        parts["loss"] = (
            parts["policy_gradient_loss"]
            + ent_coef * parts["entropy_loss"]
            + vf_coef * parts["value_loss"]
        )
        tables = {name: x.flatten(0, 1).cpu().double().numpy() for name, x in parts.items()}
        last = tables.pop("loss")[self.seen - 1, np.arange(len(self.seen))]
        minibatches = self.log_ratios.shape[1]
        means = {}
        for name, table in tables.items():
            # SB3 reports the KL of the last epoch only.
            whole = np.zeros_like(self.seen)
            epoch = (self.seen - 1) // minibatches * minibatches
            first = epoch if name == "approx_kl" else whole
            spans = zip(table.T, first, self.seen, strict=True)
            means[name] = np.array([column[a:b].mean() for column, a, b in spans])
        return {**means, "loss": last}
