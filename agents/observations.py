"""How a replay stores observations: whole, or stacks of frames with every frame stored once.

Both are rings of rows, one row per step of all lanes, counted from the beginning of the run. The
next observation of a row stands in the row after; of an episode that a time limit cut it has no
row, so it is kept beside. Of a terminated episode it is never asked.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class Whole:
    """Observations [S, rows, E, *D] as they are."""

    def __init__(self, copies: int, rows: int, lanes: int, example: np.ndarray):
        self.rows, self.lanes = rows, lanes
        self.stored = np.zeros((copies, rows, lanes, *example.shape), example.dtype)
        self.shape = example.shape
        self.finals: list[dict[tuple[int, int], np.ndarray]] = [{} for _ in range(copies)]

    def begin(self, copy: int, row: int, observations: np.ndarray) -> None:
        """Episodes of one seed begin in `row` with observations [E, *D]."""
        self.stored[copy, row % self.rows] = observations

    def write(self, row: int, observations: np.ndarray, ended: np.ndarray) -> None:
        """Observations [S, E, *D] of the next `row`; in ended [S, E] lanes an episode begins."""
        self.stored[:, row % self.rows] = observations

    def end(self, copy: int, row: int, lane: int, final: np.ndarray) -> None:
        """Keep the observation after `row`, which no row will hold."""
        self.finals[copy][row, lane] = np.array(final, self.stored.dtype)

    def cut(self, copy: int, row: int, lane: int) -> None:
        """Keep what stands after `row` beside: another episode will begin there."""
        self.finals[copy][row, lane] = self.stored[copy, (row + 1) % self.rows, lane].copy()

    def forget(self, row: int) -> None:
        """A row's transitions are given up."""
        _forget(self.finals, row, self.lanes)

    def at(self, rows: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Observations [S, B, *D] in rows and lanes [S, B]."""
        slots = _slots(self.stored, rows % self.rows, lanes)
        flat = self.stored.reshape(-1, math.prod(self.shape))
        return flat.take(slots, 0).reshape(*slots.shape, *self.shape)

    def after(self, rows: np.ndarray, lanes: np.ndarray, cut: np.ndarray) -> np.ndarray:
        """The next observations; where `cut`, a time limit ended the episode."""
        following = self.at(rows + 1, lanes)
        for copy, k in np.argwhere(cut).tolist():
            following[copy, k] = self.finals[copy][int(rows[copy, k]), int(lanes[copy, k])]
        return following

    def both(
        self, rows: np.ndarray, lanes: np.ndarray, cut: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Observations in rows and lanes, and the next ones."""
        return self.at(rows, lanes), self.after(rows, lanes, cut)

    def state(self, copy: int, held: int) -> dict[str, Any]:
        """One seed's first `held` rows as views."""
        return {"observations": self.stored[copy, :held], **_finals_state(self.finals[copy])}

    def load_state(self, copy: int, newest: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        self.stored[copy, : len(state["observations"])] = state["observations"]
        self.finals[copy] = _finals_of(state)


class Stacked:
    """Frames [S, rows, E, *F], of which an observation is a stack [k, *F], the newest last.

    How old an episode is in each row tells where a stack reaches back before its first observation.
    There it is filled as the environment filled that one: with zeros or by repeating its frame.

    Raises:
        ValueError: what the environment gives are no such stacks.
    """

    def __init__(self, copies: int, rows: int, lanes: int, example: np.ndarray, stack: int):
        if example.ndim < 2 or len(example) != stack:
            raise ValueError(f"observations {list(example.shape)} are no stacks of {stack} frames")
        self.rows, self.lanes, self.stack, self.reach = rows, lanes, stack, stack - 1
        shape = copies, rows, lanes
        self.frames = np.zeros((*shape, *example.shape[1:]), example.dtype)
        self.ages = np.zeros(shape, np.min_scalar_type(stack))  # in steps, at most k - 1
        self.repeats = np.zeros(shape, np.bool_)
        self.newest = np.zeros((copies, lanes, *example.shape), example.dtype)
        self.finals: list[dict[tuple[int, int], np.ndarray]] = [{} for _ in range(copies)]

    def begin(self, copy: int, row: int, observations: np.ndarray) -> None:
        """Episodes of one seed begin in `row` with observations [E, k, *F]."""
        for lane, observation in enumerate(observations):
            self._begin(copy, row, lane, observation)

    def _begin(self, copy: int, row: int, lane: int, observation: np.ndarray) -> None:
        older, frame = observation[:-1], observation[-1]
        repeated = bool(older.any())
        if repeated and not (older == frame).all():
            raise ValueError(
                f"an episode's first observation is no stack of {self.stack} frames: before its "
                "newest there are neither zeros nor the same frame; replay with stack=0"
            )
        at = copy, row % self.rows, lane
        self.frames[at], self.ages[at], self.repeats[at] = frame, 0, repeated
        self.newest[copy, lane] = observation

    def write(self, row: int, observations: np.ndarray, ended: np.ndarray) -> None:
        """Observations [S, E, k, *F] of the next `row`; in ended [S, E] lanes an episode begins."""
        at, before = row % self.rows, (row - 1) % self.rows
        follows = observations[:, :, :-1] == self.newest[:, :, 1:]
        if not follows.all() and not follows[~ended].all():
            raise self._broken()
        self.frames[:, at] = observations[:, :, -1]
        self.ages[:, at] = np.minimum(self.ages[:, before] + 1, self.reach)
        self.repeats[:, at] = self.repeats[:, before]
        self.newest[:] = observations
        for copy, lane in np.argwhere(ended).tolist():
            self._begin(copy, row, lane, observations[copy, lane])

    def _broken(self) -> ValueError:
        return ValueError(
            f"observations are no stacks of {self.stack} frames, the newest last: one does not "
            "continue the one before; replay with stack=0"
        )

    def end(self, copy: int, row: int, lane: int, final: np.ndarray) -> None:
        """Keep the observation after `row`, the newest, which no row will hold."""
        if not np.array_equal(final[:-1], self.newest[copy, lane, 1:]):
            raise self._broken()
        self.finals[copy][row, lane] = np.array(final[-1], self.frames.dtype)

    def cut(self, copy: int, row: int, lane: int) -> None:
        """Keep what stands after `row` beside: another episode will begin there."""
        self.finals[copy][row, lane] = self.frames[copy, (row + 1) % self.rows, lane].copy()

    def forget(self, row: int) -> None:
        """A row's transitions are given up."""
        _forget(self.finals, row, self.lanes)

    def _window(self, rows: np.ndarray, lanes: np.ndarray, back: np.ndarray) -> np.ndarray:
        """Frames [S, B, n, *F] that stand `back` [n] steps before rows and lanes [S, B]."""
        slots = _slots(self.frames, rows % self.rows, lanes)
        ages = self.ages.reshape(-1).take(slots)[..., None]
        steps = np.minimum(back, ages)
        earlier = (rows[..., None] - steps) % self.rows
        places = _slots(self.frames, earlier, lanes[..., None])
        shape = self.frames.shape[3:]
        frames = self.frames.reshape(-1, math.prod(shape)).take(places, 0)
        before = back > ages
        if before.any():
            frames[before & ~self.repeats.reshape(-1).take(slots)[..., None]] = 0
        return frames.reshape(*places.shape, *shape)

    def at(self, rows: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Observations [S, B, k, *F] in rows and lanes [S, B]."""
        return self._window(rows, lanes, np.arange(self.reach, -1, -1))

    def after(self, rows: np.ndarray, lanes: np.ndarray, cut: np.ndarray) -> np.ndarray:
        """The next observations; where `cut`, a time limit ended the episode."""
        return self._finish(
            self._window(rows, lanes, np.arange(self.reach - 1, -2, -1)), rows, lanes, cut
        )

    def both(
        self, rows: np.ndarray, lanes: np.ndarray, cut: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Observations in rows and lanes, and the next ones: two views of the same frames."""
        frames = self._window(rows, lanes, np.arange(self.reach, -2, -1))
        following = self._finish(frames[:, :, 1:], rows, lanes, cut)
        return frames[:, :, :-1], following

    def _finish(
        self, following: np.ndarray, rows: np.ndarray, lanes: np.ndarray, cut: np.ndarray
    ) -> np.ndarray:
        for copy, k in np.argwhere(cut).tolist():
            following[copy, k, -1] = self.finals[copy][int(rows[copy, k]), int(lanes[copy, k])]
        return following

    def state(self, copy: int, held: int) -> dict[str, Any]:
        """One seed's first `held` rows as views."""
        return {
            "frames": self.frames[copy, :held],
            "ages": self.ages[copy, :held],
            "repeats": self.repeats[copy, :held],
            **_finals_state(self.finals[copy]),
        }

    def load_state(self, copy: int, newest: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`, whose newest row is `newest`."""
        for name in ("frames", "ages", "repeats"):
            getattr(self, name)[copy, : len(state[name])] = state[name]
        self.finals[copy] = _finals_of(state)
        rows = np.full((len(self.frames), self.lanes), newest)
        lanes = np.broadcast_to(np.arange(self.lanes), rows.shape)
        self.newest[copy] = self.at(rows, lanes)[copy]


def _slots(stored: np.ndarray, rows: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Places in `stored` [S, rows, E, ...] flattened, of rows and lanes [S, ...]."""
    copies, height, width = stored.shape[:3]
    seed = np.arange(copies).reshape(-1, *[1] * (rows.ndim - 1))
    return (seed * height + rows) * width + lanes


def _forget(finals: list[dict[tuple[int, int], np.ndarray]], row: int, lanes: int) -> None:
    for kept in finals:
        for lane in range(lanes):
            kept.pop((row, lane), None)


def _finals_state(finals: dict[tuple[int, int], np.ndarray]) -> dict[str, Any]:
    ordered = sorted(finals.items())
    return {
        "final_places": [list(place) for place, _ in ordered],
        "finals": np.stack([x for _, x in ordered]) if ordered else None,
    }


def _finals_of(state: dict[str, Any]) -> dict[tuple[int, int], np.ndarray]:
    finals = () if state["finals"] is None else state["finals"]
    places = (tuple(place) for place in state["final_places"])
    return dict(zip(places, map(np.array, finals), strict=True))
