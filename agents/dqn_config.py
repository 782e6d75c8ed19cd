"""The options of DQN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perennial.agents.options import choice, optional, real, several, switch, text, whole
from perennial.agents.settings import (
    ACTIVATIONS,
    Config,
    UsageError,
    algorithm,
    check_network,
    experiment,
    network,
)


@dataclass(frozen=True, kw_only=True)
class DQNConfig(Config):
    """DQN: names and defaults of Stable-Baselines3, but for 256-256 networks on flat input."""

    agent: ClassVar[str] = "dqn"
    discrete_actions: ClassVar[bool | None] = True

    env: str = experiment(
        text("ID"),
        "",
        "environment with discrete actions, must be given: CartPole-v1, perennial/AtariSwitch-v0",
    )

    learning_rate: float = algorithm(real(above=0, high=10), 1e-4, "Adam's step size")
    buffer_size: int = algorithm(whole(2), 1_000_000, "transitions that the replay of a seed holds")
    learning_starts: int = algorithm(whole(1), 100, "env steps of random actions before learning")
    batch_size: int = algorithm(whole(1, 10**7), 32, "transitions per gradient step")
    tau: float = algorithm(real(above=0, high=1), 1.0, "share of the new weights in the targets")
    gamma: float = algorithm(real(0, 1), 0.99, "discount")
    train_freq: int = algorithm(whole(1, 10**6), 4, "steps of every lane between updates")
    gradient_steps: int = algorithm(whole(1, 10**4), 1, "gradient steps per update")
    target_update_interval: int = algorithm(whole(), 10_000, "env steps between target updates")
    exploration_fraction: float = algorithm(
        real(above=0, high=1), 0.1, "part of the run in which epsilon falls to its final value"
    )
    exploration_initial_eps: float = algorithm(
        real(0, 1), 1.0, "share of random actions at first", hparam=False
    )
    exploration_final_eps: float = algorithm(real(0, 1), 0.05, "share of random actions in the end")
    eps_restart: bool = algorithm(
        switch(), False, "epsilon starts again, and falls as slowly, at every change of task"
    )
    max_grad_norm: float | None = algorithm(
        optional(real(above=0), "none"),
        10.0,
        "gradients of a seed are scaled to this norm at most",
        hparam=False,
    )
    huber: float | None = algorithm(
        optional(real(above=0), "none"),
        1.0,
        "value loss mse: errors beyond this count linearly; none: squared however large",
        hparam=False,
    )
    n_step: int = algorithm(whole(1, 100), 1, "steps of reward before the target's value")
    double: bool = algorithm(
        switch(), False, "the online network chooses the action whose target value is learned from"
    )
    dueling: bool = network(
        switch(), False, "separate streams for the value of a state and what actions add to it"
    )
    prioritized_replay: bool = algorithm(
        switch(), False, "transitions with large errors are sampled more often"
    )
    prioritized_replay_alpha: float = algorithm(
        real(0, 1), 0.6, "power of the priority; 0: uniform", hparam=False
    )
    prioritized_replay_beta0: float = algorithm(
        real(0, 1), 0.4, "first power of the correcting weights; 1 at the end", hparam=False
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

    net_arch: tuple[int, ...] | None = network(
        optional(several(whole(1, 65_536), "widths such as 256,256", (1, 32)), "auto"),
        None,
        "widths of the hidden layers; auto: 256,256, on pixels 512 after the convolutions",
    )
    activation: str = network(choice(*ACTIVATIONS), "relu", "nonlinearity")

    @property
    def flat_arch(self) -> tuple[int, ...]:
        """Widths of the hidden layers where observations are flat and none are given."""
        return (256, 256)

    @property
    def rollout(self) -> int:
        """Env steps per seed between points of the log: about 1000, whole rounds of updates."""
        one = self.num_envs * self.train_freq
        return max(1, round(1000 / one)) * one

    def validate(self) -> None:
        """Raise UsageError where options clash."""
        if self.exploration_final_eps > self.exploration_initial_eps:
            raise UsageError(
                f"exploration_final_eps={self.exploration_final_eps:g} is more than "
                f"exploration_initial_eps={self.exploration_initial_eps:g}; epsilon only falls"
            )
        check_network(self.plasticity, self.net_arch or self.flat_arch, self.activation)
        super().validate()
