"""Proportional priorities of S seeds' transitions, drawn from a tree of sums.

Schaul et al., "Prioritized Experience Replay", 2016 (arXiv 1511.05952), the proportional variant. A
node sums 128 children, so a million transitions make three levels, and a draw three vectorised
searches. Every sum is recomputed from its children, never adjusted: it is a function of the leaves
alone, so nothing drifts and a state is the leaves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_WIDTH = 128  # children of a node
_LEAST = 1e-6  # added to every error, so that nothing is never drawn


class Priorities:
    """Priorities by slot; 0 is never drawn.

    Args:
        copies, slots: S and how many transitions each seed may hold.
        alpha: exponent of the errors; 0 draws uniformly.
        sleeping: whether slots can be put to sleep: kept, but not drawn.
    """

    def __init__(self, copies: int, slots: int, alpha: float, sleeping: bool = False):
        self.copies, self.slots, self.alpha = copies, slots, alpha
        self.levels: list[np.ndarray] = []  # leaves first; each [S, nodes, 128]
        width = slots
        while not self.levels or width > 1:
            width = -(-width // _WIDTH)
            self.levels.append(np.zeros((copies, width, _WIDTH)))
        self.asleep = np.zeros((copies, slots)) if sleeping else None
        self.highest = np.ones(copies)  # that any transition of a seed has had

    def leaves(self, copy: int) -> np.ndarray:
        """Priorities [slots] of one seed, those asleep as 0: a view."""
        return self.levels[0][copy].reshape(-1)[: self.slots]

    def add(self, copy: int, slots: np.ndarray) -> None:
        """New transitions in `slots` [n] of one seed, with the highest priority there was."""
        self._write(copy, slots, self.highest[copy])

    def drop(self, copy: int, slots: np.ndarray) -> None:
        """Forget `slots` [n] of one seed."""
        self._write(copy, slots, 0.0)
        if self.asleep is not None:
            self.asleep[copy, slots] = 0.0

    def change(self, copy: int, slots: np.ndarray, errors: np.ndarray) -> None:
        """New errors [n] of `slots` [n] of one seed; of slots named twice the last one counts."""
        values = (np.abs(errors).astype(np.float64) + _LEAST) ** self.alpha
        if len(values):
            self.highest[copy] = max(self.highest[copy], values.max())
        self._write(copy, slots, values)

    def clear(self, copy: int) -> None:
        """Forget all of one seed."""
        self.levels[0][copy] = 0.0
        self.highest[copy] = 1.0
        self._sum(copy)

    def wake(self, copy: int, slots: np.ndarray) -> None:
        """From now on draw `slots` of one seed and no others."""
        assert self.asleep is not None
        leaves, asleep = self.leaves(copy), self.asleep[copy]
        asleep += leaves  # of the two one is 0
        leaves[:] = 0.0
        leaves[slots] = asleep[slots]
        asleep[slots] = 0.0
        self._sum(copy)

    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots [S, B] for numbers [S, B] in [0, 1), one per stratum, and their probabilities."""
        copies, batch = uniform.shape
        total = self.levels[-1][:, 0].cumsum(-1)[:, -1:]  # [S, 1]
        left = (np.arange(batch) + uniform) / batch * total
        left = left.reshape(-1)
        seed = np.arange(copies).repeat(batch)
        node, start = np.zeros_like(seed), np.arange(len(seed)) * _WIDTH
        for level in reversed(self.levels):
            children = level.reshape(-1, _WIDTH).take(seed * level.shape[1] + node, 0)
            sums = children.cumsum(-1)
            # Sums of sums are rounded: what is left may exceed the last child by a bit.
            left = np.minimum(left, np.nextafter(sums[:, -1], 0.0))
            child = (sums > left[:, None]).argmax(-1)
            place = start + child
            left = np.where(child > 0, left - sums.take(place - 1), left)
            node = node * _WIDTH + child
        shape = copies, batch
        return node.reshape(shape), children.take(place).reshape(shape) / total

    def _write(self, copy: int, slots: np.ndarray, values: Any) -> None:
        self.levels[0][copy].reshape(-1)[slots] = values
        node = slots
        for level, above in zip(self.levels, self.levels[1:], strict=False):
            node = node // _WIDTH
            above[copy].reshape(-1)[node] = level[copy][node].sum(-1)

    def _sum(self, copy: int) -> None:
        """All sums of one seed."""
        for level, above in zip(self.levels, self.levels[1:], strict=False):
            above[copy].reshape(-1)[: level.shape[1]] = level[copy].sum(-1)

    def state(self, copy: int, slots: int) -> dict[str, Any]:
        """One seed's first `slots` priorities as views."""
        return {
            "leaves": self.leaves(copy)[:slots],
            "asleep": None if self.asleep is None else self.asleep[copy, :slots],
            "highest": float(self.highest[copy]),
        }

    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        held = len(state["leaves"])
        self.leaves(copy)[:held] = state["leaves"]
        if self.asleep is not None:
            self.asleep[copy, :held] = state["asleep"]
        self.highest[copy] = state["highest"]
        self._sum(copy)
