"""Epsilon-greedy exploration of S seeds, each from its own stream and on its own schedule."""

from __future__ import annotations

from typing import Any

import numpy as np

from perennial.agents.config import DQNConfig
from perennial.agents.streams import Streams


class EpsilonGreedy:
    """A share epsilon of actions is random: all of them before learning starts.

    Epsilon falls linearly from its initial to its final value over `exploration_fraction` of the
    run, as in Stable-Baselines3; with `eps_restart` again after every change of task. Each lane
    draws for itself (SB3 once for all lanes).
    """

    def __init__(self, config: DQNConfig, seeds: tuple[int, ...], actions: int):
        self.config, self.actions = config, actions
        self.stream = Streams(seeds, "action")
        self.tasks: list[int | None] = [None] * len(seeds)
        self.since = np.zeros(len(seeds), np.int64)  # env step at which epsilon began to fall

    def epsilon(self, env_steps: int) -> np.ndarray:
        """Epsilon [S] at a step of the run."""
        config = self.config
        length = config.exploration_fraction * config.steps
        done = np.minimum((env_steps - self.since) / length, 1.0)
        first, last = config.exploration_initial_eps, config.exploration_final_eps
        return first + done * (last - first)

    def notice(self, tasks: list[int], env_steps: int) -> None:
        """See the task [S] of each seed, after `env_steps` of the run."""
        for copy, (task, before) in enumerate(zip(tasks, self.tasks, strict=True)):
            if before is not None and task != before and self.config.eps_restart:
                self.since[copy] = env_steps
        self.tasks = list(tasks)

    def draw(self, env_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Which lanes act at random [S, E], and the action that each would take so."""
        drawn = self.stream.uniform(self.config.num_envs, 2)
        if env_steps < self.config.learning_starts:
            explores = np.ones(drawn.shape[:2], np.bool_)
        else:
            explores = drawn[..., 0] < self.epsilon(env_steps)[:, None]
        return explores, (drawn[..., 1] * self.actions).astype(np.int64)

    def state(self, copy: int) -> dict[str, Any]:
        """One seed's stream and schedule."""
        return {
            "stream": self.stream.state(copy),
            "task": self.tasks[copy],
            "since": int(self.since[copy]),
        }

    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        self.stream.load_state(copy, state["stream"])
        self.tasks[copy], self.since[copy] = state["task"], state["since"]
