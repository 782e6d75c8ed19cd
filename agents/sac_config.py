"""The options of SAC."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from perennial.agents.options import Kind, choice, real, several, whole
from perennial.agents.settings import (
    ACTIVATIONS,
    Config,
    UsageError,
    algorithm,
    check_network,
    network,
)


@dataclass(frozen=True, kw_only=True)
class SACConfig(Config):
    """SAC: names and defaults of Stable-Baselines3."""

    agent: ClassVar[str] = "sac"
    discrete_actions: ClassVar[bool | None] = False

    learning_rate: float = algorithm(real(above=0, high=10), 3e-4, "step size of every Adam")
    buffer_size: int = algorithm(whole(2), 1_000_000, "transitions that the replay of a seed holds")
    learning_starts: int = algorithm(whole(1), 100, "env steps of random actions before learning")
    batch_size: int = algorithm(whole(1, 10**7), 256, "transitions per gradient step")
    tau: float = algorithm(real(above=0, high=1), 0.005, "share of the new weights in the targets")
    gamma: float = algorithm(real(0, 1), 0.99, "discount")
    train_freq: int = algorithm(whole(1, 10**6), 1, "steps of every lane between updates")
    gradient_steps: int = algorithm(whole(1, 10**4), 1, "gradient steps per update: replay ratio")
    priming_steps: int = algorithm(
        whole(0), 0, "gradient steps on the first env steps, before the next one: heavy priming"
    )
    target_update_interval: int = algorithm(whole(), 1, "gradient steps between target updates")
    n_step: int = algorithm(whole(1, 100), 1, "steps of reward before the target's value")
    ent_coef: str = algorithm(
        Kind("X|auto|auto_X", str),
        "auto",
        "temperature: learned, learned from X on, or fixed",
        hparam=False,
    )
    betas: tuple[float, float] = algorithm(
        several(real(0, below=1), "two numbers such as 0.9,0.999", (2, 2)),
        (0.9, 0.999),
        "Adam's decay rates",
    )
    adam_eps: float = algorithm(real(above=0, high=1), 1e-8, "Adam's epsilon")
    at_change: str = algorithm(
        choice("keep", "clear", "per-task"),
        "keep",
        "the replay at a change: keep all, start empty, or sample the task's own part",
    )

    net_arch: tuple[int, ...] = network(
        several(whole(1, 65_536), "widths such as 256,256", (1, 32)),
        (256, 256),
        "widths of the hidden layers",
    )
    activation: str = network(choice(*ACTIVATIONS), "relu", "nonlinearity")

    @property
    def rollout(self) -> int:
        """Env steps per seed between points of the log: about 1000, whole steps of lanes."""
        return max(1, round(1000 / self.num_envs)) * self.num_envs

    @property
    def learns_ent_coef(self) -> bool:
        """Whether the temperature is learned."""
        return self.ent_coef.startswith("auto")

    @property
    def first_ent_coef(self) -> float:
        """The temperature to begin with."""
        return 1.0 if self.ent_coef == "auto" else float(self.ent_coef.removeprefix("auto_"))

    def validate(self) -> None:
        """Raise UsageError where options clash."""
        try:
            good = 0 < self.first_ent_coef < math.inf
        except ValueError:
            good = False
        if not good:
            raise UsageError(
                f"ent_coef: expected auto, auto_0.1 or a number above 0, not {self.ent_coef!r}"
            )
        check_network(self.plasticity, self.net_arch, self.activation)
        super().validate()
