"""Random streams named by (seed, purpose): the same numbers whatever runs beside them.

Every draw of an agent comes from a CPU generator of its own seed and purpose, so a run does not
depend on the device, on the other seeds of its group, or on how often another purpose draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def entropy(seed: int, purpose: str) -> np.random.SeedSequence:
    """The root of one stream: the seed mixed with the purpose's name (CRC-32)."""
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])


def torch_generator(seed: int, purpose: str) -> torch.Generator:
    """CPU generator for draws that torch makes (initial weights)."""
    state = int(entropy(seed, purpose).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state & (2**63 - 1))


def environment_seeds(seed: int, lanes: int) -> list[int]:
    """One physics seed per lane; lane e has the same seed whatever the number of lanes."""
    return [
        int(np.random.SeedSequence([seed, zlib.crc32(b"environment"), lane]).generate_state(1)[0])
        for lane in range(lanes)
    ]


class Streams:
    """One numpy generator per seed for one purpose; its state is plain numbers."""

    def __init__(self, seeds: Sequence[int], purpose: str):
        self.generators = [np.random.Generator(np.random.PCG64(entropy(s, purpose))) for s in seeds]

    def normal(self, *shape: int, dtype: type = np.float32) -> np.ndarray:
        """Standard normal numbers [S, *shape]; each seed draws from its own stream."""
        kind: Any = np.float32 if dtype == np.float32 else np.float64
        return np.stack([g.standard_normal(shape, dtype=kind) for g in self.generators])

    def uniform(self, *shape: int) -> np.ndarray:
        """Uniform numbers in [0, 1), float64 [S, *shape]."""
        return np.stack([g.random(shape) for g in self.generators])

    def permutations(self, n: int, count: int) -> np.ndarray:
        """`count` permutations of range(n) per seed, int64 [S, count, n]."""
        return np.stack(
            [np.stack([g.permutation(n) for _ in range(count)]) for g in self.generators]
        )

    def state(self, copy: int) -> dict[str, Any]:
        """Bit generator state of one seed: plain integers."""
        return dict(self.generators[copy].bit_generator.state)

    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed's stream from `state`."""
        self.generators[copy].bit_generator.state = state
