"""What happened: finished episodes of every seed, and the running averages that the log shows."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

_WINDOW = 100  # episodes that rollout/ep_rew_mean averages over, as in Stable-Baselines3


class Episode(NamedTuple):
    """One finished episode; `env_steps` is the seed's clock at its end, `ret` the undiscounted return."""

    env_steps: int
    task: int
    ret: float
    length: int


class Episodes:
    """Adds up rewards of S seeds with E lanes each and keeps the finished episodes until they are taken."""

    def __init__(self, copies: int, lanes: int):
        self.copies, self.lanes = copies, lanes
        self.env_steps = 0  # of every seed: the seeds of a process go in step
        self.returns = np.zeros(copies * lanes)
        self.lengths = np.zeros(copies * lanes, np.int64)
        self.tasks = np.zeros(copies * lanes, np.int64)
        self.finished: list[list[Episode]] = [[] for _ in range(copies)]
        self.recent: list[deque[Episode]] = [deque(maxlen=_WINDOW) for _ in range(copies)]
        self.task_sums: list[tuple[int, float, int]] = [(0, 0.0, 0)] * copies  # task, sum of returns, count

    def start(self, infos: dict[str, Any]) -> None:
        """Take the tasks that the lanes begin with."""
        if "task" in infos:
            self.tasks[:] = infos["task"]

    def step(self, rewards: np.ndarray, ended: np.ndarray | None, infos: dict[str, Any]) -> None:
        """Count one step of every lane; `ended` [N] is None when no episode ended."""
        self.env_steps += self.lanes
        self.returns += rewards
        self.lengths += 1
        if ended is None:
            return
        for lane in np.flatnonzero(ended):
            copy = int(lane) // self.lanes
            episode = Episode(
                self.env_steps, int(self.tasks[lane]), float(self.returns[lane]), int(self.lengths[lane])
            )
            self.finished[copy].append(episode)
            self.recent[copy].append(episode)
            task, total, count = self.task_sums[copy]
            if episode.task > task:
                task, total, count = episode.task, 0.0, 0
            if episode.task == task:
                total, count = total + episode.ret, count + 1
            self.task_sums[copy] = task, total, count
        self.returns[ended] = 0.0
        self.lengths[ended] = 0
        if "task" in infos:
            self.tasks[ended] = np.asarray(infos["task"])[ended]

    def take(self, copy: int) -> list[Episode]:
        """Episodes of one seed that finished since the last call."""
        finished, self.finished[copy] = self.finished[copy], []
        return finished

    def averages(self, copy: int) -> dict[str, float]:
        """The seed's `rollout/*` and `task/return` scalars; empty while no episode has finished."""
        recent = self.recent[copy]
        if not recent:
            return {}
        task, total, count = self.task_sums[copy]
        averages = {
            "rollout/ep_rew_mean": sum(e.ret for e in recent) / len(recent),
            "rollout/ep_len_mean": sum(e.length for e in recent) / len(recent),
        }
        if count:
            averages["task/return"] = total / count
        return averages

    def state(self, copy: int) -> dict[str, Any]:
        """One seed's counters; call after `take`."""
        rows = slice(copy * self.lanes, (copy + 1) * self.lanes)
        return {
            "env_steps": self.env_steps,
            "returns": self.returns[rows].copy(),
            "lengths": self.lengths[rows].copy(),
            "tasks": self.tasks[rows].copy(),
            "recent": [list(e) for e in self.recent[copy]],
            "task_sums": list(self.task_sums[copy]),
        }

    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        rows = slice(copy * self.lanes, (copy + 1) * self.lanes)
        self.env_steps = state["env_steps"]
        self.returns[rows], self.lengths[rows] = state["returns"], state["lengths"]
        self.tasks[rows] = state["tasks"]
        self.finished[copy] = []
        self.recent[copy] = deque((Episode(*e) for e in state["recent"]), maxlen=_WINDOW)
        task, total, count = state["task_sums"]
        self.task_sums[copy] = task, total, count
