"""The options of PPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from perennial.agents.options import choice, optional, real, several, switch, whole
from perennial.agents.settings import (
    ACTIVATIONS,
    Config,
    UsageError,
    algorithm,
    check_network,
    network,
)


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Config):
    """PPO: names and defaults of Stable-Baselines3, but for ReLU networks, on flat input separate
    ones of 256, 256."""

    agent: ClassVar[str] = "ppo"
    flat_arch: ClassVar[tuple[int, ...]] = (256, 256)  # net_arch=auto on flat observations

    learning_rate: float = algorithm(real(above=0, high=10), 3e-4, "Adam's step size")
    lr_schedule: str = algorithm(
        choice("constant", "linear"), "constant", "linear: down to 0 at the last step"
    )
    n_steps: int = algorithm(whole(1, 10_000_000), 2048, "env steps per lane and rollout")
    batch_size: int = algorithm(whole(), 64, "minibatch; must divide n_steps*num_envs")
    n_epochs: int = algorithm(whole(1, 10_000), 10, "passes over each rollout")
    gamma: float = algorithm(real(0, 1), 0.99, "discount")
    gae_lambda: float = algorithm(real(0, 1), 0.95, "decay of advantage estimates")
    clip_range: float = algorithm(
        real(above=0, high=100), 0.2, "probability ratios are clipped to 1 +- this"
    )
    clip_range_vf: float | None = algorithm(
        optional(real(above=0)), None, "value changes are clipped to +- this", hparam=False
    )
    advantage_norm: str = algorithm(
        choice("minibatch", "batch", "none"), "minibatch", "over what advantages are standardised"
    )
    ent_coef: float = algorithm(real(0, 1e6), 0.0, "weight of the entropy bonus")
    vf_coef: float = algorithm(real(0, 1e6), 0.5, "weight of the value loss (plain mse)")
    max_grad_norm: float | None = algorithm(
        optional(real(above=0)), 0.5, "the gradient's norm, per seed, is clipped to this"
    )
    target_kl: float | None = algorithm(
        optional(real(above=0)), None, "stop a seed's update at 1.5 times this approximate KL"
    )
    betas: tuple[float, float] = algorithm(
        several(real(0, below=1), "two numbers such as 0.9,0.999", (2, 2)),
        (0.9, 0.999),
        "Adam's decay rates",
    )
    adam_eps: float = algorithm(real(above=0, high=1), 1e-5, "Adam's epsilon")
    timeout: str = algorithm(
        choice("bootstrap", "terminal"),
        "bootstrap",
        "at a time limit: go on with the value of the last state, or as if all had ended",
    )
    norm_obs: bool = algorithm(switch(), False, "normalise observations by running moments")
    norm_reward: bool = algorithm(switch(), False, "scale rewards by the deviation of returns")
    clip_actions: bool | None = algorithm(
        optional(switch(), "auto"),
        None,
        "clip actions to the action space; auto: yes, but for perennial/ environments",
        hparam=False,
    )

    net_arch: tuple[int, ...] | None = network(
        optional(several(whole(1, 65_536), "widths such as 256,256", (1, 32)), "auto"),
        None,
        "widths of hidden layers (on images after convolutions); auto: 256,256, images 512 or 128",
    )
    trunk: str = network(
        choice("auto", "shared", "separate"),
        "auto",
        "shared: policy and value are two heads of one network; auto: on images",
        hparam=False,
    )
    activation: str = network(choice(*ACTIVATIONS), "relu", "nonlinearity")
    init: str = network(
        choice("orthogonal", "lecun"), "orthogonal", "how weights are drawn (lecun: uniform)"
    )
    log_std_init: float = network(
        real(-20, 5), 0.0, "first log standard deviation of actions", hparam=False
    )

    @property
    def rollout(self) -> int:
        """Env steps per seed and rollout."""
        return self.n_steps * self.num_envs

    @property
    def clips_actions(self) -> bool:
        """As asked, else SB3's habit of clipping, but not in our environments.

        Their control cost counts the action that was asked for, as the published slippery ant does.
        """
        if self.clip_actions is not None:
            return self.clip_actions
        return not self.env.startswith("perennial/")

    def shares_trunk(self, shape: Sequence[int]) -> bool:
        """Whether policy and value share their hidden layers on observations of this shape."""
        return len(shape) > 1 if self.trunk == "auto" else self.trunk == "shared"

    def validate(self) -> None:
        """Raise UsageError where options clash."""
        if self.rollout % self.batch_size:
            raise UsageError(
                f"batch_size={self.batch_size} does not divide n_steps*num_envs={self.rollout}"
                f"{_near_divisors(self.rollout, self.batch_size)}"
            )
        if self.advantage_norm == "minibatch" and self.batch_size == 1:
            raise UsageError(
                "batch_size=1 leaves no spread to standardise advantages by; "
                "take batch_size of 2 or more, or advantage_norm=none"
            )
        if self.advantage_norm == "batch" and self.rollout == 1:
            raise UsageError(
                "a rollout of 1 step leaves no spread to standardise advantages by; "
                "take n_steps of 2 or more, or advantage_norm=none"
            )
        if self.clip_range_vf is not None and self.value_loss != "mse":
            raise UsageError(
                f"clip_range_vf={self.clip_range_vf:g} clips values, and value_loss="
                f"{self.value_loss} fits distributions; take value_loss=mse or clip_range_vf=none"
            )
        check_network(self.plasticity, self.net_arch or self.flat_arch, self.activation)
        super().validate()


def _near_divisors(total: int, wanted: int) -> str:
    """`; try 64 or 128`: the divisors of `total` on either side of `wanted`."""
    small = [d for d in range(1, math.isqrt(total) + 1) if total % d == 0]
    divisors = sorted({*small, *(total // d for d in small)} - {1})
    near = [d for d in divisors if d < wanted][-1:] + [d for d in divisors if d > wanted][:1]
    return f"; try {' or '.join(map(str, near))}" if near else ""
