"""What a run is: frozen dataclasses; their fields are the command line's options.

Each field has its kind of value, its default and its help in one place. Build them through
`config.build_config`, which converts and checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from perennial.agents.options import (
    choice,
    folder,
    option,
    optional,
    pairs,
    real,
    seeds,
    several,
    specs,
    switch,
    text,
    whole,
)

EQUAL_BETAS = "adam-equal-betas"  # sugar for betas 0.99,0.99, which build_config resolves
ACTIVATIONS = ("relu", "tanh", "leaky-relu", "elu", "silu", "gelu")

_experiment = partial(option, "experiment")
_algorithm = partial(option, "algorithm")
_network = partial(option, "network")
_plasticity = partial(option, "plasticity")
_run = partial(option, "run", hparam=False)


class UsageError(ValueError):
    """A mistake of the user's, in one line that names the clash and the fix."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options that every agent has."""

    agent: ClassVar[str]

    preset: str | None = _experiment(
        optional(text("NAME")), None, "published protocol to start from: perennial list presets"
    )
    env: str = _experiment(
        text("ID"), "perennial/SlipperyAnt-v0", "environment: ours or any registered Gymnasium id"
    )
    env_args: Mapping[str, Any] = _experiment(
        pairs(), {}, "the environment's parameters: perennial list envs"
    )
    steps: int = _experiment(
        whole(), 1_000_000, "env steps per seed; 2e6 and 2_000_000 are the same"
    )
    seeds: tuple[int, ...] = _experiment(
        seeds(), (0,), "seeds to train: 4 (0 to 3), 0:4, 0,3,7, or 3, (seed 3 alone)", hparam=False
    )
    num_envs: int = _experiment(whole(1, 65_536), 1, "environments (lanes) per seed")

    plasticity: tuple[str, ...] = _plasticity(
        specs(), (), "methods, as cbp or cbp:rate=1e-4,maturity=10000: perennial list plasticity"
    )
    value_loss: str = _plasticity(choice("mse"), "mse", "how values are coded and fitted")
    metrics_every: int | None = _plasticity(
        optional(whole(), "auto"),
        None,
        "env steps between measurements; auto: 4 rollouts, and at most 2000 in a run",
        hparam=False,
    )

    device: str = _run(
        choice("auto", "cpu", "cuda"), "auto", "auto: a GPU when there is one and it pays"
    )
    run_dir: str | None = _run(
        optional(folder(), "auto"), None, "auto: runs/<env>/<agent>-<methods>/<time>"
    )
    checkpoint_every: int | None = _run(
        optional(whole(), "auto"),
        None,
        "env steps between checkpoints; auto: 5 percent of the run, at most 250k",
    )

    @property
    def rollout(self) -> int:
        """Env steps per seed between two updates."""
        return self.num_envs

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the interventions, in order."""
        return tuple(spec.partition(":")[0] for spec in self.plasticity)

    @property
    def interventions(self) -> tuple[str, ...]:
        """Specs of what acts on networks: `plasticity` without the sugar for Adam's betas."""
        return tuple(s for s in self.plasticity if s.partition(":")[0] != EQUAL_BETAS)

    @property
    def checkpoint_interval(self) -> int:
        """Env steps per seed between checkpoints: whole rollouts."""
        wanted = self.checkpoint_every or min(self.steps // 20, 250_000)
        return max(1, round(wanted / self.rollout)) * self.rollout

    @property
    def metrics_interval(self) -> int:
        """Env steps per seed between measurements of plasticity: whole rollouts.

        At most 2000 measurements: half of the 20 MB that a long run's event file may take.
        """
        wanted = self.metrics_every or max(4 * self.rollout, self.steps / 2000)
        return math.ceil(wanted / self.rollout) * self.rollout

    @property
    def clips_actions(self) -> bool:
        """Whether actions are clipped to the action space before they reach the environment."""
        return False

    def validate(self) -> None:
        """Raise UsageError where options clash with each other."""
        if self.steps < self.rollout:
            raise UsageError(
                f"steps={self.steps} is less than one rollout of {self.rollout} env steps; "
                f"give at least {self.rollout} steps or make the rollout shorter"
            )


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Config):
    """PPO: names and defaults of Stable-Baselines3, but for separate ReLU networks."""

    agent: ClassVar[str] = "ppo"

    learning_rate: float = _algorithm(real(above=0, high=10), 3e-4, "Adam's step size")
    lr_schedule: str = _algorithm(
        choice("constant", "linear"), "constant", "linear: down to 0 at the last step"
    )
    n_steps: int = _algorithm(whole(1, 10_000_000), 2048, "env steps per lane and rollout")
    batch_size: int = _algorithm(whole(), 64, "minibatch; must divide n_steps*num_envs")
    n_epochs: int = _algorithm(whole(1, 10_000), 10, "passes over each rollout")
    gamma: float = _algorithm(real(0, 1), 0.99, "discount")
    gae_lambda: float = _algorithm(real(0, 1), 0.95, "decay of advantage estimates")
    clip_range: float = _algorithm(
        real(above=0, high=100), 0.2, "probability ratios are clipped to 1 +- this"
    )
    clip_range_vf: float | None = _algorithm(
        optional(real(above=0)), None, "value changes are clipped to +- this", hparam=False
    )
    advantage_norm: str = _algorithm(
        choice("minibatch", "batch", "none"), "minibatch", "over what advantages are standardised"
    )
    ent_coef: float = _algorithm(real(0, 1e6), 0.0, "weight of the entropy bonus")
    vf_coef: float = _algorithm(real(0, 1e6), 0.5, "weight of the value loss (plain mse)")
    max_grad_norm: float | None = _algorithm(
        optional(real(above=0)), 0.5, "the gradient's norm, per seed, is clipped to this"
    )
    target_kl: float | None = _algorithm(
        optional(real(above=0)), None, "stop a seed's update at 1.5 times this approximate KL"
    )
    betas: tuple[float, float] = _algorithm(
        several(real(0, below=1), "two numbers such as 0.9,0.999", (2, 2)),
        (0.9, 0.999),
        "Adam's decay rates",
    )
    adam_eps: float = _algorithm(real(above=0, high=1), 1e-5, "Adam's epsilon")
    timeout: str = _algorithm(
        choice("bootstrap", "terminal"),
        "bootstrap",
        "at a time limit: go on with the value of the last state, or as if all had ended",
    )
    norm_obs: bool = _algorithm(switch(), False, "normalise observations by running moments")
    norm_reward: bool = _algorithm(switch(), False, "scale rewards by the deviation of returns")
    clip_actions: bool | None = _algorithm(
        optional(switch(), "auto"),
        None,
        "clip actions to the action space; auto: yes, but for perennial/ environments",
        hparam=False,
    )

    net_arch: tuple[int, ...] = _network(
        several(whole(1, 65_536), "widths such as 256,256", (1, 32)),
        (256, 256),
        "widths of the hidden layers",
    )
    activation: str = _network(choice(*ACTIVATIONS), "relu", "nonlinearity")
    init: str = _network(
        choice("orthogonal", "lecun"), "orthogonal", "how weights are drawn (lecun: uniform)"
    )
    log_std_init: float = _network(
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
        _check_network(self.plasticity, self.net_arch, self.activation)
        super().validate()


def _check_network(specs: tuple[str, ...], widths: tuple[int, ...], activation: str) -> None:
    """Whether the methods that change networks fit ours, and each other."""
    if not specs:
        return
    from perennial.plasticity.fit import check_network
    from perennial.plasticity.registry import parse_spec

    try:
        check_network(dict(map(parse_spec, specs)), widths, activation)
    except ValueError as error:
        raise UsageError(f"plasticity: {error}") from None


def _near_divisors(total: int, wanted: int) -> str:
    """`; try 64 or 128`: the divisors of `total` on either side of `wanted`."""
    small = [d for d in range(1, math.isqrt(total) + 1) if total % d == 0]
    divisors = sorted({*small, *(total // d for d in small)} - {1})
    near = [d for d in divisors if d < wanted][-1:] + [d for d in divisors if d > wanted][:1]
    return f"; try {' or '.join(map(str, near))}" if near else ""
