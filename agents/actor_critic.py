"""The networks of PPO, and what of a configuration shapes them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from torch import Tensor, nn

from perennial.agents.config import Config, PPOConfig
from perennial.agents.distributions import distribution_of
from perennial.agents.networks import MLP
from perennial.agents.streams import torch_generator
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.copies import Init


class ActorCritic(nn.Module):
    """Separate policy and value networks and the action distribution, for S seeds."""

    def __init__(
        self,
        config: PPOConfig,
        n_obs: int,
        actions: gym.Space,
        n_value: int,
        seeds: tuple[int, ...],
    ):
        super().__init__()
        generators = [torch_generator(s, "init") for s in seeds]
        if config.init == "orthogonal":  # SB3's gains
            hidden, policy_out, value_out = (Init("orthogonal", g) for g in (2**0.5, 0.01, 1.0))
        else:
            hidden = policy_out = value_out = Init("lecun-uniform")
        if n_value > 1:  # distributions begin in the middle of their support
            value_out = Init("zeros")
        copies, arch, activation = len(seeds), config.net_arch, config.activation
        self.distribution = distribution_of(
            actions, copies, config.log_std_init, config.clips_actions
        )
        n_out = self.distribution.n_out
        self.policy = MLP(copies, (n_obs, *arch, n_out), activation, hidden, policy_out, generators)
        self.value = MLP(copies, (n_obs, *arch, n_value), activation, hidden, value_out, generators)
        for net in (self.policy, self.value):
            rewrite(net, config.interventions, generators=generators)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Policy outputs [S, B, n_out] and value outputs [S, B, m] of observations [S, B, D]."""
        return self.policy(observations), self.value(observations)


def observation_size(config: Config, space: gym.Space) -> int:
    """Width of an observation; one line for spaces that our networks cannot read."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise ValueError(
            f"{config.agent} needs flat Box observations; {config.env} has {space}: choose "
            "another env"
        )
    return int(np.prod(space.shape))


def check_actions(config: Config, space: gym.Space, discrete: bool) -> None:
    """One line for action spaces that the agent cannot use."""
    box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    if not box and not (discrete and isinstance(space, gym.spaces.Discrete)):
        wanted = "flat Box or Discrete" if discrete else "flat Box"
        raise ValueError(
            f"{config.agent} needs {wanted} actions; {config.env} has {space}: choose another env"
        )
