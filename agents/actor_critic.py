"""The networks of PPO, how they run, and what of a configuration shapes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from perennial.agents.acting import Acting
from perennial.agents.aside import Aside
from perennial.agents.by_copy import ByCopy
from perennial.agents.config import Config, PPOConfig
from perennial.agents.convnets import build_net, build_trunk, useful_threads
from perennial.agents.distributions import distribution_of
from perennial.agents.networks import Record, WrittenOut
from perennial.agents.passes import passes
from perennial.agents.streams import torch_generator
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.copies import BatchedLinear, Init

P = TypeVar("P")


class TwoHeads(nn.Module):
    """One trunk under a policy and a value head: [S, B, *D] -> [S, B, n_out + m], policy first."""

    def __init__(self, trunk: nn.Sequential, policy: nn.Module, value: nn.Module):
        super().__init__()
        self.trunk, self.policy, self.value = trunk, policy, value

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return torch.cat((self.policy(features), self.value(features)), -1)


class ActorCritic(nn.Module):
    """Policy and value networks and the action distribution, for S seeds.

    Either `policy` and `value`, or `shared` with a head for each.

    Args:
        shape: of an observation, from `observation_shape`.
        n_value: m, outputs of the value network.
    """

    def __init__(
        self,
        config: PPOConfig,
        shape: Sequence[int],
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
        copies = len(seeds)
        self.distribution = distribution_of(
            actions, copies, config.log_std_init, config.clips_actions
        )
        self.n_out, self.n_value = self.distribution.n_out, n_value
        self.shared: TwoHeads | None = None
        #: What metrics call layers whose name does not tell.
        self.keys: dict[str, str] = {}
        if config.shares_trunk(shape):
            trunk, width = build_trunk(config, shape, hidden, generators)
            heads = [
                BatchedLinear(copies, width, n, init=init, generators=generators)
                for n, init in ((self.n_out, policy_out), (n_value, value_out))
            ]
            self.shared = TwoHeads(nn.Sequential(*trunk), *heads)
            self.keys = {"shared.policy": "policy/0", "shared.value": "value/0"}
            rewrite(self.shared, config.interventions, generators=generators)
            return
        self.policy = build_net(config, shape, self.n_out, hidden, policy_out, generators)
        self.value = build_net(config, shape, n_value, hidden, value_out, generators)
        for net in (self.policy, self.value):
            rewrite(net, config.interventions, generators=generators)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Policy outputs [S, B, n_out] and value outputs [S, B, m] of observations [S, B, *D]."""
        if self.shared is None:
            return self.policy(observations), self.value(observations)
        return self.split(self.shared(observations))

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of both heads in the last axis -> those of the policy, those of the value."""
        policy, value = outputs.split([self.n_out, self.n_value], -1)
        return policy, value

    def values(self, observations: Tensor) -> Tensor:
        """Value outputs [S, B, m]."""
        return self.value(observations) if self.shared is None else self(observations)[1]

    def choices(self, observations: Tensor) -> Tensor:
        """Policy outputs [S, B, n_out]."""
        return self.policy(observations) if self.shared is None else self(observations)[0]


class Sides:
    """How the policy's and the value's side run: for acting, and for learning.

    Args:
        net: on its device.
        shape: of an observation.
        threads: two networks on two threads, one core each, beat matrix products split over two
            cores; where autograd runs them, products take the threads, but for small images.
    """

    def __init__(self, net: ActorCritic, shape: Sequence[int], threads: int):
        self.net = net
        self.device = next(net.parameters()).device
        on_cpu = self.device.type == "cpu"
        parts = [net.shared] if net.shared is not None else [net.policy, net.value]
        images = len(shape) > 1
        self.passes = [
            ByCopy(part) if images and ByCopy.fits(part) else passes(part) for part in parts
        ]
        written_out = isinstance(self.passes[0], WrittenOut)
        self.acting = Acting(net.policy) if written_out and on_cpu else None  # type: ignore[arg-type]
        threaded = useful_threads(shape, threads) > 1 and on_cpu
        self.aside = Aside(threaded and written_out)
        if threaded and not written_out:
            torch.set_num_threads(threads)

    def act(self, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Policy outputs [S, E, n_out], and value outputs [S, E, m] where they come with them."""
        if self.acting is not None:
            return self.acting.forward(observations), None
        x = torch.from_numpy(observations).to(self.device)
        with torch.no_grad():
            if self.net.shared is None:
                return self.net.policy(x).cpu().numpy(), None
            policy, value = self.net(x)
            return policy.cpu().numpy(), value.cpu().numpy()

    def learn(
        self,
        observations: Tensor,
        record: Record | None,
        policy_side: Callable[[Tensor], tuple[P, Tensor]],
        value_side: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[P, Tensor]:
        """Forward on observations [S, B, *D], and backward from the gradients of both sides.

        Each side takes its outputs and gives a result, which is returned, and their gradient.
        """
        if self.net.shared is not None:
            policy, value = self.net.split(self.passes[0].forward(observations, record))
            chosen, d_policy = policy_side(policy)
            loss, d_value = value_side(value)
            self.passes[0].backward(torch.cat((d_policy, d_value), -1))
            return chosen, loss

        def run(place: int, side: Callable[[Tensor], tuple[P, Tensor]]) -> P:
            result, gradient = side(self.passes[place].forward(observations, record))
            self.passes[place].backward(gradient)
            return result

        return self.aside.pair(lambda: run(0, policy_side), lambda: run(1, value_side))  # type: ignore[arg-type,return-value]


def observation_size(config: Config, space: gym.Space) -> int:
    """Width of an observation; one line for spaces that the agent's networks cannot read."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise ValueError(
            f"{config.agent} needs flat Box observations; {config.env} has {space}: choose "
            "another env"
        )
    return int(np.prod(space.shape))


def check_actions(config: Config, space: gym.Space, *, box: bool, discrete: bool) -> None:
    """One line for action spaces that the agent cannot use: it takes flat boxes, or choices."""
    flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    if (box and flat) or (discrete and isinstance(space, gym.spaces.Discrete)):
        return
    wanted = " or ".join(["flat Box"] * box + ["Discrete"] * discrete)
    raise ValueError(
        f"{config.agent} needs {wanted} actions; {config.env} has {space}: choose another env"
    )
