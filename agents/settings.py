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
    Kind,
    choice,
    folder,
    option,
    optional,
    pairs,
    seeds,
    specs,
    text,
    whole,
)

EQUAL_BETAS = "adam-equal-betas"  # sugar for betas 0.99,0.99, which build_config resolves
ACTIVATIONS = ("relu", "tanh", "leaky-relu", "elu", "silu", "gelu")

experiment = partial(option, "experiment")
algorithm = partial(option, "algorithm")
network = partial(option, "network")
method = partial(option, "plasticity")
run = partial(option, "run", hparam=False)


class UsageError(ValueError):
    """A mistake of the user's, in one line that names the clash and the fix."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options that every agent has."""

    agent: ClassVar[str]
    discrete_actions: ClassVar[bool | None] = None  # what the agent needs; None: any will do

    preset: str | None = experiment(
        optional(text("NAME")), None, "published protocol to start from: perennial list presets"
    )
    env: str = experiment(
        text("ID"), "perennial/SlipperyAnt-v0", "environment: ours or any registered Gymnasium id"
    )
    env_args: Mapping[str, Any] = experiment(
        pairs(), {}, "the environment's parameters: perennial list envs"
    )
    steps: int = experiment(
        whole(), 1_000_000, "env steps per seed; 2e6 and 2_000_000 are the same"
    )
    seeds: tuple[int, ...] = experiment(
        seeds(), (0,), "seeds to train: 4 (0 to 3), 0:4, 0,3,7, or 3, (seed 3 alone)", hparam=False
    )
    num_envs: int = experiment(whole(1, 65_536), 1, "environments (lanes) per seed")

    reward_clip: str = algorithm(
        Kind("X|auto|none", str),
        "auto",
        "learn from rewards clipped to +-X, log them raw; auto: 1 on Atari, else none",
        hparam=False,
    )

    plasticity: tuple[str, ...] = method(
        specs(), (), "methods, as cbp or cbp:rate=1e-4,maturity=10000: perennial list plasticity"
    )
    value_loss: str = method(
        text("SPEC"), "mse", "how values are fitted: mse, two-hot, hl-gauss, c51, quantile"
    )
    metrics_every: int | None = method(
        optional(whole(), "auto"),
        None,
        "env steps between measurements; auto: 4 rollouts, and at most 1400 in a run",
        hparam=False,
    )

    device: str = run(
        choice("auto", "cpu", "cuda"), "auto", "auto: a GPU when there is one and it pays"
    )
    run_dir: str | None = run(
        optional(folder(), "auto"), None, "auto: runs/<env>/<agent>-<methods>/<time>"
    )
    checkpoint_every: int | None = run(
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

        At most 1400 measurements: most of the 20 MB that a long run's event file may take.
        """
        wanted = self.metrics_every or max(4 * self.rollout, self.steps / 1400)
        return math.ceil(wanted / self.rollout) * self.rollout

    @property
    def clips_rewards(self) -> float | None:
        """Bound of the rewards that are learned from; None: they are learned from as they are."""
        if self.reward_clip == "auto":
            return 1.0 if self.env == "perennial/AtariSwitch-v0" else None
        return None if self.reward_clip == "none" else float(self.reward_clip)

    @property
    def clips_actions(self) -> bool:
        """Whether actions are clipped to the action space before they reach the environment."""
        return False

    def validate(self) -> None:
        """Raise UsageError where options clash with each other."""
        try:
            bound = self.clips_rewards
            good = bound is None or 0 < bound < math.inf
        except ValueError:
            good = False
        if not good:
            raise UsageError(
                f"reward_clip: expected auto, none or a number above 0, not {self.reward_clip!r}"
            )
        if self.steps < self.rollout:
            raise UsageError(
                f"steps={self.steps} is less than one rollout of {self.rollout} env steps; "
                f"give at least {self.rollout} steps or make the rollout shorter"
            )


@dataclass(frozen=True)
class Preset:
    """A protocol's configurations, one per agent, with the paper it comes from."""

    configs: tuple[Config, ...]
    help: str  # one line
    source: str

    @property
    def agents(self) -> tuple[str, ...]:
        """The agents that the protocol is for."""
        return tuple(config.agent for config in self.configs)

    def config(self, agent: str) -> Config:
        """The configuration of one of `agents`."""
        return next(config for config in self.configs if config.agent == agent)


def check_network(specs: tuple[str, ...], widths: tuple[int, ...], activation: str) -> None:
    """Whether the methods that change networks fit ours, and each other."""
    if not specs:
        return
    from perennial.plasticity import fit
    from perennial.plasticity.registry import parse_spec

    try:
        fit.check_network(dict(map(parse_spec, specs)), widths, activation)
    except ValueError as error:
        raise UsageError(f"plasticity: {error}") from None
