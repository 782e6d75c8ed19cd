"""Replay of S seeds: what was seen is stored once, and sampled per seed from its own stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from perennial.agents.streams import Streams

AT_CHANGE = ("keep", "clear", "per-task")


class Sample(NamedTuple):
    """B transitions of each of S seeds."""

    observations: np.ndarray  # [S, B, *D]
    actions: np.ndarray  # [S, B, *A]
    rewards: np.ndarray  # [S, B], discounted sum over the steps taken
    discounts: np.ndarray  # [S, B], gamma^steps, or 0 where the episode terminated
    next_observations: np.ndarray  # [S, B, *D]


class Replay:
    """Ring buffers of S seeds with E lanes, in rows of one step of all lanes.

    An observation is stored once: the next one stands in the next row, and the last one of an
    episode that a time limit cut, which has no row, in a list beside. Of a terminated episode it is
    never asked. Arrays are allocated whole but the system hands out their memory as they fill.

    Args:
        copies, lanes: S and E.
        capacity: transitions per seed.
        observation, action: example arrays of one lane; their shapes and dtypes are stored.
        at_change: "keep" everything, "clear" at a change of task, or sample "per-task" from what
            was seen in the task that is on (also when it comes again).
    """

    def __init__(
        self,
        copies: int,
        lanes: int,
        capacity: int,
        observation: np.ndarray,
        action: np.ndarray,
        at_change: str = "keep",
    ):
        # One row more: the newest row's next observation is written ahead.
        self.copies, self.lanes, self.rows = copies, lanes, max(2, capacity // lanes) + 1
        shape = copies, self.rows, lanes
        self.observations = np.zeros((*shape, *observation.shape), observation.dtype)
        self.actions = np.zeros((*shape, *action.shape), action.dtype)
        self.rewards = np.zeros(shape, np.float32)
        self.terminated = np.zeros(shape, np.bool_)
        self.ended = np.zeros(shape, np.bool_)
        self.finals: list[dict[tuple[int, int], np.ndarray]] = [{} for _ in range(copies)]
        self.written = 0  # rows ever written: the same for all seeds
        self.at_change = at_change
        # Per seed: [task, first row, row after the last], rows counted from the beginning.
        self.spans: list[list[list[int]]] = [[] for _ in range(copies)]

    def __len__(self) -> int:
        """Transitions that each seed holds."""
        return min(self.written, self.rows - 1) * self.lanes

    def start(self, observations: np.ndarray) -> None:
        """Take the observations [S, E, *D] that the next actions answer."""
        self.observations[:, self.written % self.rows] = observations

    def add(
        self,
        tasks: list[int],
        actions: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        ended: np.ndarray,
        next_observations: np.ndarray,
        finals: dict[int, np.ndarray],
    ) -> None:
        """One step of every lane.

        tasks: the task of each seed. actions [S, E, *A]; rewards, terminated, ended [S, E];
        next_observations [S, E, *D] are those that act next, `finals` the last ones of lanes
        (counted over all seeds) whose episode a time limit cut.
        """
        row = self.written % self.rows
        self.actions[:, row], self.rewards[:, row] = actions, rewards
        self.terminated[:, row], self.ended[:, row] = terminated, ended
        oldest = self.written - (self.rows - 1)
        for copy, task in enumerate(tasks):
            spans = self.spans[copy]
            if not spans or spans[-1][0] != task:
                if self.at_change == "clear":
                    spans.clear()
                spans.append([task, self.written, self.written])
            spans[-1][2] = self.written + 1
            spans[0][1] = max(spans[0][1], oldest + 1)
            if spans[0][1] >= spans[0][2]:
                spans.pop(0)
            for lane in range(self.lanes):
                self.finals[copy].pop((oldest, lane), None)
        for lane, final in finals.items():
            self.finals[lane // self.lanes][self.written, lane % self.lanes] = final
        self.written += 1
        self.observations[:, self.written % self.rows] = next_observations

    def sample(self, streams: Streams, batch: int, gamma: float, n_step: int = 1) -> Sample:
        """`batch` transitions per seed, uniformly with replacement, over up to n_step steps."""
        parts = [self._sample(c, streams, batch, gamma, n_step) for c in range(self.copies)]
        return Sample(*(np.stack(column) for column in zip(*parts, strict=True)))

    def _sample(
        self, copy: int, streams: Streams, batch: int, gamma: float, n_step: int
    ) -> tuple[np.ndarray, ...]:
        spans = self.spans[copy]
        if self.at_change == "per-task":
            spans = [span for span in spans if span[0] == spans[-1][0]]
        lengths = np.array([last - first for _, first, last in spans])
        before = np.cumsum(lengths) - lengths
        drawn = streams.generators[copy].integers(0, lengths.sum() * self.lanes, batch)
        place, lane = np.divmod(drawn, self.lanes)
        span = np.searchsorted(before, place, side="right") - 1
        first = np.array([span[1] for span in spans])[span] + place - before[span]

        rewards, discounts = np.zeros(batch, np.float32), np.full(batch, gamma, np.float32)
        row, going, weight = first.copy(), np.ones(batch, np.bool_), 1.0
        for step in range(n_step):
            at = row % self.rows
            rewards += np.float32(weight) * going * self.rewards[copy, at, lane]
            discounts = np.where(going, np.float32(gamma ** (step + 1)), discounts)
            discounts[going & self.terminated[copy, at, lane]] = 0.0
            # An episode's end and the newest row end the sum.
            going = going & ~self.ended[copy, at, lane] & (row + 1 < self.written)
            if step + 1 < n_step:
                row = np.where(going, row + 1, row)
            weight *= gamma
        following = self.observations[copy, (row + 1) % self.rows, lane]
        cut = (
            self.ended[copy, row % self.rows, lane] & ~self.terminated[copy, row % self.rows, lane]
        )
        for k in np.flatnonzero(cut):
            following[k] = self.finals[copy][int(row[k]), int(lane[k])]
        at = first % self.rows
        return (
            self.observations[copy, at, lane],
            self.actions[copy, at, lane],
            rewards,
            discounts,
            following,
        )

    def state(self, copy: int) -> dict[str, Any]:
        """One seed's rows as views: nothing is copied."""
        held = min(self.written + 1, self.rows)
        finals = sorted(self.finals[copy].items())
        return {
            "written": self.written,
            "spans": self.spans[copy],
            "observations": self.observations[copy, :held],
            "actions": self.actions[copy, :held],
            "rewards": self.rewards[copy, :held],
            "terminated": self.terminated[copy, :held],
            "ended": self.ended[copy, :held],
            "final_places": [list(place) for place, _ in finals],
            "finals": np.stack([x for _, x in finals]) if finals else None,
        }

    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        held = len(state["observations"])
        for name in ("observations", "actions", "rewards", "terminated", "ended"):
            getattr(self, name)[copy, :held] = state[name]
        self.written = state["written"]
        self.spans[copy] = [list(span) for span in state["spans"]]
        finals = () if state["finals"] is None else state["finals"]
        places = (tuple(place) for place in state["final_places"])
        self.finals[copy] = dict(zip(places, map(np.array, finals), strict=True))
