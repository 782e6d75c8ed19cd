"""Replay of S seeds: what was seen is stored once, and sampled per seed from its own stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from perennial.agents.observations import Stacked, Whole
from perennial.agents.priorities import Priorities
from perennial.agents.streams import Streams

AT_CHANGE = ("keep", "clear", "per-task")


class Places(NamedTuple):
    """Where the transitions of a sample stand, for `Replay.prioritise`."""

    rows: np.ndarray  # [S, B], counted from the beginning
    lanes: np.ndarray  # [S, B]


class Sample(NamedTuple):
    """B transitions of each of S seeds."""

    observations: np.ndarray  # [S, B, *D]
    actions: np.ndarray  # [S, B, *A]
    rewards: np.ndarray  # [S, B], discounted sum over the steps taken
    discounts: np.ndarray  # [S, B], gamma^steps, or 0 where the episode terminated
    next_observations: np.ndarray  # [S, B, *D]
    weights: np.ndarray | None = None  # [S, B], importance weights of a prioritised draw
    places: Places | None = None


class Replay:
    """Ring buffers of S seeds with E lanes, in rows of one step of all lanes.

    An observation is stored once, and of stacked frames each frame. Arrays are allocated whole but
    the system hands out their memory as they fill.

    Args:
        copies, lanes: S and E.
        capacity: transitions per seed.
        observation, action: example arrays of one lane; their shapes and dtypes are stored.
        at_change: "keep" everything, "clear" at a change of task, or sample "per-task" from what
            was seen in the task that is on (also when it comes again).
        stack: k, where observations are stacks [k, ...] of frames, the newest last; 0: they are
            stored whole.
        alpha: exponent of priorities; None: samples are uniform.
    """

    def __init__(
        self,
        copies: int,
        lanes: int,
        capacity: int,
        observation: np.ndarray,
        action: np.ndarray,
        at_change: str = "keep",
        stack: int = 0,
        alpha: float | None = None,
    ):
        self.copies, self.lanes, self.capacity = copies, lanes, max(2, capacity // lanes)
        # The newest row's next observation is written ahead; the oldest one's frames reach back.
        self.rows = self.capacity + 1 + max(0, stack - 1)
        self.seen: Whole | Stacked = (
            Stacked(copies, self.rows, lanes, observation, stack)
            if stack
            else Whole(copies, self.rows, lanes, observation)
        )
        shape = copies, self.rows, lanes
        self.actions = np.zeros((*shape, *action.shape), action.dtype)
        self.rewards = np.zeros(shape, np.float32)
        self.terminated = np.zeros(shape, np.bool_)
        self.ended = np.zeros(shape, np.bool_)
        self.written = 0  # rows ever written: the same for all seeds
        self.at_change = at_change
        # Per seed: [task, first row, row after the last], rows counted from the beginning.
        self.spans: list[list[list[int]]] = [[] for _ in range(copies)]
        self.priorities = (
            None
            if alpha is None
            else Priorities(copies, self.rows * lanes, alpha, sleeping=at_change == "per-task")
        )

    def __len__(self) -> int:
        """Transitions that each seed holds."""
        return min(self.written, self.capacity) * self.lanes

    def start(self, observations: np.ndarray) -> None:
        """Take the observations [S, E, *D] that the first actions answer."""
        for copy in range(self.copies):
            self.seen.begin(copy, self.written, observations[copy])

    def restart(self, copy: int, observations: np.ndarray) -> None:
        """New episodes of one seed from observations [E, *D]: those that were on are cut."""
        newest = self.written - 1
        for lane in range(self.lanes if self.written else 0):
            if not self.ended[copy, newest % self.rows, lane]:
                self.ended[copy, newest % self.rows, lane] = True
                self.seen.cut(copy, newest, lane)
        self.seen.begin(copy, self.written, observations)

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
        row, oldest = self.written % self.rows, self.written - self.capacity
        self.actions[:, row], self.rewards[:, row] = actions, rewards
        self.terminated[:, row], self.ended[:, row] = terminated, ended
        self.seen.forget(oldest)
        for lane, final in finals.items():
            self.seen.end(lane // self.lanes, self.written, lane % self.lanes, final)
        for copy, task in enumerate(tasks):
            self._note(copy, task, oldest)
        self.written += 1
        self.seen.write(self.written, next_observations, ended)

    def _note(self, copy: int, task: int, oldest: int) -> None:
        """The row that is written is of `task`; the row `oldest` is gone."""
        spans = self.spans[copy]
        turned = not spans or spans[-1][0] != task
        if turned:
            if self.at_change == "clear":
                spans.clear()
            spans.append([task, self.written, self.written])
        spans[-1][2] = self.written + 1
        spans[0][1] = max(spans[0][1], oldest + 1)
        if spans[0][1] >= spans[0][2]:
            spans.pop(0)
        if self.priorities is None:
            return
        if turned and self.at_change == "clear":
            self.priorities.clear(copy)
        if oldest >= 0:
            self.priorities.drop(copy, self._slots(oldest, oldest + 1))
        self.priorities.add(copy, self._slots(self.written, self.written + 1))
        if turned and self.at_change == "per-task":
            own = [self._slots(first, last) for _, first, last in self._drawn(copy)]
            self.priorities.wake(copy, np.concatenate(own))

    def _slots(self, first: int, last: int) -> np.ndarray:
        """Where priorities of rows `first` to `last` stand."""
        rows = np.arange(first, last) % self.rows
        return (rows[:, None] * self.lanes + np.arange(self.lanes)).reshape(-1)

    def _drawn(self, copy: int) -> list[list[int]]:
        """The spans that are sampled from."""
        spans = self.spans[copy]
        if self.at_change != "per-task":
            return spans
        return [span for span in spans if span[0] == spans[-1][0]]

    def sample(
        self,
        streams: Streams,
        batch: int,
        gamma: float,
        n_step: int = 1,
        beta: float | None = None,
    ) -> Sample:
        """`batch` transitions per seed with replacement, each over up to n_step steps.

        Uniform, or, with priorities, one from each of `batch` strata of equal mass; `beta` then
        asks for importance weights (N P)^-beta, divided by the largest of the batch as in Dopamine
        (Schaul et al. divide by the largest of the replay, which no update has to hold).
        """
        if self.priorities is None:
            assert beta is None, "importance weights are those of a prioritised replay"
            rows, lanes = self._uniform(streams, batch)
            weights = None
        else:
            rows, lanes, chances = self._prioritised(streams, batch)
            weights = None
            if beta is not None:
                # Largest weight: smallest chance. N cancels.
                weights = (chances.min(1, keepdims=True) / chances) ** beta
                weights = weights.astype(np.float32)
        at = self._flat(rows, lanes)
        rewards = self.rewards.reshape(-1)[at]
        terminated, ended = self.terminated.reshape(-1)[at], self.ended.reshape(-1)[at]
        actions = self.actions.reshape(self.rewards.size, -1).take(at, 0)
        actions = actions.reshape(*at.shape, *self.actions.shape[3:])
        if n_step == 1:
            discounts = np.where(terminated, np.float32(0.0), np.float32(gamma))
            seen, following = self.seen.both(rows, lanes, ended & ~terminated)
        else:
            last, rewards, discounts, cut = self._ahead(rows, lanes, gamma, n_step)
            seen, following = self.seen.at(rows, lanes), self.seen.after(last, lanes, cut)
        places = None if self.priorities is None else Places(rows, lanes)
        return Sample(seen, actions, rewards, discounts, following, weights, places)

    def _flat(self, rows: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Indices [S, B] into flattened arrays [S, rows, E]."""
        seed = np.arange(self.copies)[:, None] * self.rows
        return (seed + rows % self.rows) * self.lanes + lanes

    def _ahead(
        self, rows: np.ndarray, lanes: np.ndarray, gamma: float, n_step: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Last rows, sums of rewards, discounts, and whether a time limit ended the episode.

        An episode's end and the newest row end a sum.
        """
        going = np.ones(rows.shape, np.bool_)
        total, discounts = np.zeros(rows.shape, np.float32), np.zeros(rows.shape, np.float32)
        for step in range(n_step):
            at = self._flat(rows, lanes)
            total += np.float32(gamma**step) * going * self.rewards.reshape(-1)[at]
            discounts = np.where(going, np.float32(gamma ** (step + 1)), discounts)
            terminated, ended = self.terminated.reshape(-1)[at], self.ended.reshape(-1)[at]
            discounts[going & terminated] = 0.0
            going = going & ~ended & (rows + 1 < self.written)
            if step + 1 < n_step:
                rows = rows + going
        return rows, total, discounts, ended & ~terminated

    def _uniform(self, streams: Streams, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and lanes [S, B]."""
        rows, lanes = np.empty((2, self.copies, batch), np.int64)
        for copy in range(self.copies):
            spans = self._drawn(copy)
            lengths = np.array([last - first for _, first, last in spans])
            before = np.cumsum(lengths) - lengths
            drawn = streams.generators[copy].integers(0, lengths.sum() * self.lanes, batch)
            place, lanes[copy] = np.divmod(drawn, self.lanes)
            rows[copy] = place + spans[0][1]
            if len(spans) > 1:
                span = np.searchsorted(before, place, side="right") - 1
                rows[copy] = np.array([span[1] for span in spans])[span] + place - before[span]
        return rows, lanes

    def _prioritised(
        self, streams: Streams, batch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, lanes and probabilities [S, B]."""
        assert self.priorities is not None
        slots, chances = self.priorities.draw(streams.uniform(batch))
        places, lanes = np.divmod(slots, self.lanes)
        # The newest row that stands there: the one being written ahead has no priority yet.
        newest = self.written - 1
        return newest - (newest - places) % self.rows, lanes, chances

    def prioritise(self, places: Places, errors: np.ndarray) -> None:
        """Set priorities to |errors| [S, B], of transitions that are still there."""
        assert self.priorities is not None
        for copy in range(self.copies):
            rows, lanes = places.rows[copy], places.lanes[copy]
            slots = rows % self.rows * self.lanes + lanes
            there = (rows >= self.written - self.capacity) & (
                self.priorities.leaves(copy)[slots] > 0
            )
            self.priorities.change(copy, slots[there], errors[copy][there])

    def state(self, copy: int) -> dict[str, Any]:
        """One seed's rows as views: nothing is copied."""
        held = min(self.written + 1, self.rows)
        priorities = self.priorities
        return {
            "written": self.written,
            "spans": self.spans[copy],
            "actions": self.actions[copy, :held],
            "rewards": self.rewards[copy, :held],
            "terminated": self.terminated[copy, :held],
            "ended": self.ended[copy, :held],
            "seen": self.seen.state(copy, held),
            "priorities": priorities and priorities.state(copy, held * self.lanes),
        }

    def load_state(self, copy: int, state: dict[str, Any] | None) -> None:
        """Continue one seed from `state`; from None, empty: enough to act."""
        if state is None:
            return
        for name in ("actions", "rewards", "terminated", "ended"):
            getattr(self, name)[copy, : len(state[name])] = state[name]
        self.written = state["written"]
        self.spans[copy] = [list(span) for span in state["spans"]]
        self.seen.load_state(copy, self.written, state["seen"])
        if self.priorities is not None:
            self.priorities.load_state(copy, state["priorities"])
