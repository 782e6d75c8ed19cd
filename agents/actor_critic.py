"""The networks of PPO, and what of a configuration shapes them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from torch import Tensor, nn

from perennial.agents.config import Config, PPOConfig
from perennial.agents.distributions import Gaussian
from perennial.agents.networks import MLP
from perennial.agents.streams import torch_generator
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.copies import Init


class ActorCritic(nn.Module):
    """Separate policy and value networks and the action distribution, for S seeds."""

    def __init__(
        self, config: PPOConfig, n_obs: int, n_act: int, n_value: int, seeds: tuple[int, ...]
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
        self.policy = MLP(copies, (n_obs, *arch, n_act), activation, hidden, policy_out, generators)
        self.value = MLP(copies, (n_obs, *arch, n_value), activation, hidden, value_out, generators)
        for net in (self.policy, self.value):
            rewrite(net, config.interventions, generators=generators)
        self.distribution = Gaussian(copies, n_act, config.log_std_init)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Means [S, B, A] and value outputs [S, B, m] of observations [S, B, D]."""
        return self.policy(observations), self.value(observations)


def sizes(config: Config, observation_space: gym.Space, action_space: gym.Space) -> tuple[int, int]:
    """Widths of observation and action; one line for spaces that PPO cannot use."""
    for name, space in (("observation", observation_space), ("action", action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise ValueError(
                f"{config.agent} needs a flat Box {name} space; {config.env} has {space}: "
                "choose another env"
            )
    shapes = observation_space.shape, action_space.shape
    return int(np.prod(shapes[0] or ())), int(np.prod(shapes[1] or ()))
