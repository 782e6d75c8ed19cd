"""What happened: finished episodes of every seed, and the running averages that the log shows."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

_WINDOW = 100  # episodes that rollout/ep_rew_mean averages over, as in Stable-Baselines3


class Episode(NamedTuple):
    """One finished episode: the seed's clock at its end, task, undiscounted return, length."""

    env_steps: int
    task: int
    ret: float
    length: int


class Episodes:
    """Adds up rewards of S seeds with E lanes each; keeps finished episodes until taken."""

    def __init__(self, copies: int, lanes: int):
        self.copies, self.lanes = copies, lanes
        self.env_steps = 0  # of every seed: the seeds of a process go in step
        self.returns = np.zeros(copies * lanes)
        # The step of the current rollout at which each lane's episode began: negative for earlier
        # ones.
        self.begun = np.zeros(copies * lanes, np.int64)
        self.finished: list[list[Episode]] = [[] for _ in range(copies)]
        self.recent: list[deque[Episode]] = [deque(maxlen=_WINDOW) for _ in range(copies)]
        self.task_sums: list[tuple[int, float, int]] = [
            (0, 0.0, 0)
        ] * copies  # task, sum of returns, count
        #: Of every seed the lowest and the highest return so far, and 0.
        self.extremes = [(0.0, 0.0)] * copies

    def end(self, t: int, rewards: np.ndarray, ended: np.ndarray, infos: dict[str, Any]) -> None:
        """Finish the episodes of lanes `ended` [N] at step t of a rollout with rewards [T, N]."""
        tasks = infos["final_info"].get("task")  # None: the environment never changes
        for lane in np.flatnonzero(ended):
            copy, first = int(lane) // self.lanes, int(self.begun[lane])
            episode = Episode(
                self.env_steps + (t + 1) * self.lanes,
                0 if tasks is None else int(tasks[lane]),
                float(self.returns[lane] + rewards[max(first, 0) : t + 1, lane].sum()),
                t + 1 - first,
            )
            self.finished[copy].append(episode)
            self.recent[copy].append(episode)
            task, total, count = self.task_sums[copy]
            if episode.task > task:
                task, total, count = episode.task, 0.0, 0
            if episode.task == task:
                total, count = total + episode.ret, count + 1
            self.task_sums[copy] = task, total, count
            low, high = self.extremes[copy]
            self.extremes[copy] = min(low, episode.ret), max(high, episode.ret)
        self.returns[ended] = 0.0
        self.begun[ended] = t + 1

    def abandon(self, copy: int) -> None:
        """Forget the unfinished episodes of one seed: its lanes begin new ones."""
        rows = slice(copy * self.lanes, (copy + 1) * self.lanes)
        self.returns[rows], self.begun[rows] = 0.0, 0

    def rollout(self, rewards: np.ndarray) -> None:
        """Count a whole rollout with rewards [T, N], after the ends of its episodes."""
        steps = len(rewards)
        for lane, first in enumerate(self.begun.tolist()):
            self.returns[lane] += rewards[max(first, 0) :, lane].sum()
        self.begun -= steps
        self.env_steps += steps * self.lanes

    def take(self, copy: int) -> list[Episode]:
        """Episodes of one seed that finished since the last call."""
        finished, self.finished[copy] = self.finished[copy], []
        return finished

    def averages(self, copy: int) -> dict[str, float]:
        """The seed's `rollout/*` and `task/return` scalars; empty while no episode has finished."""
        recent = self.recent[copy]
        if not recent:
            return {}
        _, total, count = self.task_sums[copy]
        averages = {
            "rollout/ep_rew_mean": sum(e.ret for e in recent) / len(recent),
            "rollout/ep_len_mean": sum(e.length for e in recent) / len(recent),
        }
        if count:
            averages["task/return"] = total / count
        return averages

    def latest(self, copy: int) -> tuple[int, float] | None:
        """The newest task with a finished episode, and the mean return of its last, up to 100."""
        recent = self.recent[copy]
        if not recent:
            return None
        task = max(e.task for e in recent)
        returns = [e.ret for e in recent if e.task == task]
        return task, sum(returns) / len(returns)

    def state(self, copy: int) -> dict[str, Any]:
        """One seed's counters; call after `take`."""
        rows = slice(copy * self.lanes, (copy + 1) * self.lanes)
        return {
            "env_steps": self.env_steps,
            "returns": self.returns[rows].copy(),
            "begun": self.begun[rows].copy(),
            "recent": [list(e) for e in self.recent[copy]],
            "task_sums": list(self.task_sums[copy]),
            "extremes": list(self.extremes[copy]),
        }

    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        rows = slice(copy * self.lanes, (copy + 1) * self.lanes)
        self.env_steps = state["env_steps"]
        self.returns[rows], self.begun[rows] = state["returns"], state["begun"]
        self.finished[copy] = []
        self.recent[copy] = deque((Episode(*e) for e in state["recent"]), maxlen=_WINDOW)
        task, total, count = state["task_sums"]
        self.task_sums[copy] = task, total, count
        low, high = state.get("extremes", (0.0, 0.0))
        self.extremes[copy] = low, high
