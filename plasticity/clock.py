"""The clock of a handle: optimizer steps per copy, known to the host and to the device alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Clock:
    """Counts the steps of each copy; says which copies the current step moves.

    Attributes:
        seeds: of the copies; random streams are named after them.
        updates: int64 `[S]`, steps done. In `after_step` the current one is counted.
        host: the same as Python ints; None when the host does not know them (a compiled step, a
            mask on the device): then everything runs without host shortcuts, to the same result.
        mask: bool `[S]` of the copies that the step moves; None when all.
        moving: the same as host integers; None when all, or when the host does not know.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds = tuple(seeds)
        self.copies = len(self.seeds)
        self.device = device
        self.updates = torch.zeros(self.copies, dtype=torch.int64, device=device)
        # On the CPU written to where they lie: a tensor's operation costs a hundred times as much.
        lying = self.updates.numpy().data if device.type == "cpu" else None
        self._lying: memoryview | None = lying
        self._on_cuda = device.type == "cuda"
        self.host: list[int] | None = [0] * self.copies
        self.mask: Tensor | None = None
        self.moving: tuple[int, ...] | None = None
        self._blind = False
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def choose(self, active: Sequence[int] | Sequence[bool] | Tensor | None) -> None:
        """Set which copies the current step moves: None for all, indices, S bools, or a mask."""
        self.mask = self.moving = None
        self._blind = False
        if active is None:
            return
        if isinstance(active, Tensor):
            self.mask, self._blind = active, True
            return
        if any(isinstance(entry, bool) for entry in active):
            if len(active) != self.copies:
                raise ValueError(f"active has {len(active)} bools for {self.copies} copies")
            active = [copy for copy, moves in enumerate(active) if moves]
        moving = tuple(active)
        if len(moving) == self.copies:
            return
        if moving not in self._masks:
            chosen = [copy in moving for copy in range(self.copies)]
            self._masks[moving] = torch.tensor(chosen, device=self.device)
        self.mask, self.moving = self._masks[moving], moving

    def tick(self) -> None:
        """One step is done."""
        compiling = torch.compiler.is_compiling()
        if self.host is None or compiling or self._blind or self._capturing():
            seen = self.host is None and not (compiling or self._blind or self._capturing())
            self.updates.add_(1 if self.mask is None else self.mask)
            self.host = None
            if seen:
                self.reload()
            return
        for copy in range(self.copies) if self.moving is None else self.moving:
            self.host[copy] += 1
            if self._lying is not None:
                self._lying[copy] = self.host[copy]
        if self._lying is None:
            self.updates.add_(1 if self.mask is None else self.mask)

    def reload(self) -> None:
        """Ask the device once: after loading, and after steps that the host did not see."""
        self.host = self.updates.tolist()

    @property
    def known(self) -> list[int] | None:
        """Steps per copy where the host may act on them, else None."""
        if torch.compiler.is_compiling() or self._capturing():
            return None
        return self.host

    def _capturing(self) -> bool:
        """A CUDA graph would freeze what the host knows now."""
        return self._on_cuda and torch.cuda.is_current_stream_capturing()

    def current(self) -> range | tuple[int, ...]:
        """Copies that the current step moves, as far as the host knows."""
        return range(self.copies) if self.moving is None else self.moving

    def due(self, every: int) -> Tensor | None:
        """Copies `[S]` for which the current step is a multiple of `every`.

        None when the host knows that there is none: return early then.
        """
        known = self.known
        if known is not None and all(known[copy] % every for copy in self.current()):
            return None
        due = self.updates % every == 0
        if self.mask is not None:
            due = due & self.mask
        return due

    def keep(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` for the copies that move, `old` bit for bit for the others; both `[S, ...]`."""
        if self.mask is None:
            return new
        return torch.where(self.mask.view(-1, *[1] * (new.ndim - 1)), new, old)
