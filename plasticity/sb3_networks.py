"""What a stock Stable-Baselines3 model trains: one `Network` per optimizer that owns units.

The optimizer of SAC's temperature owns none, so nothing is ever attached to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy, ContinuousCritic
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.sac.policies import SACPolicy
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity import draws
from perennial.plasticity.base import Handle, Intervention, attach
from perennial.plasticity.copies import Init
from perennial.plasticity.probe import find_units
from perennial.plasticity.units import WEIGHTED, Units

Batch = tuple[Any, Tensor]  # observations as SB3 hands them to policies, and actions
_ROWS = 512  # of a batch for metrics: ranks need more rows than units


@dataclass(frozen=True, eq=False)
class Network:
    """One network of a model, as its optimizer sees it.

    Attributes:
        name: of its random streams and saved state.
        module: what is run, and put into evaluation mode.
        nets: name in tags -> modules whose layers stand under it, in order.
        forward: runs it on a batch; returns whatever leaves it.
        optimizer: None for a target network.
        target: the slow copy that it feeds, parameter by parameter.
    """

    name: str
    module: nn.Module
    nets: dict[str, list[nn.Module]]
    forward: Callable[[Batch], Any]
    optimizer: Optimizer | None = None
    target: Network | None = None

    @property
    def names(self) -> set[str]:
        """What `net=` of a method may call the network or a part of it."""
        return {self.name, *(key.rpartition("/")[0] for key in self._keys().values())}

    def concerns(self, method: Intervention) -> bool:
        """Whether a method is for this network, or for a part of it."""
        net = part_of(method)
        return net == "all" or net in self.names

    def find(self, example: Batch, optimizer: Optimizer) -> tuple[Units, Units]:
        """The units whose incoming weights `optimizer` owns; and all, to be closed in the end."""
        every = find_units(self.module, example, self.forward, keys=self._keys())
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        sites = [site for site in every if site.producer.module.weight in owned]
        layers = [layer for layer in every.layers if layer.module.weight in owned]
        if len(layers) == len(every.layers):
            return every, every
        return Units(every.model, sites, layers, hooks=False), every

    def attach(self, methods: Sequence[Intervention], units: Units, seed: int = 0) -> Handle:
        """Methods, made for this network, at work on it; its loop calls the handle."""
        assert self.optimizer is not None
        for method in methods:
            if part_of(method) == self.name and self.name not in self.nets:
                method.net = "all"  # type: ignore[assignment]  # of what this optimizer trains
        # Actor and critic of one seed must not draw the same numbers.
        seeds = [draws.key_of(seed, self.name)]
        targets = [] if self.target is None else [self.target.module]
        return attach(methods, units, self.optimizer, seeds=seeds, hooks=False, targets=targets)

    def _keys(self) -> dict[str, str]:
        """Tags `<net>/<index>` of the layers by their names in the module."""
        names = {module: name for name, module in self.module.named_modules()}
        keys: dict[str, str] = {}
        for net, modules in self.nets.items():
            layers = [m for root in modules for m in root.modules() if isinstance(m, WEIGHTED)]
            keys |= {names[layer]: f"{net}/{place}" for place, layer in enumerate(layers)}
        return keys


def part_of(method: Intervention) -> str:
    """The part of the model that a method is for (`reset:net=value`), or "all"."""
    net = getattr(method, "net", "all")
    return net if isinstance(net, str) else "all"


def networks_of(policy: BasePolicy) -> list[Network]:
    """Every network of an on-policy, SAC or DQN policy that has an optimizer of its own."""
    if isinstance(policy, ActorCriticPolicy):
        return [_actor_critic(policy)]
    if isinstance(policy, SACPolicy):
        target = _twins("target", policy.critic_target)
        return [_actor(policy), _twins("critic", policy.critic, target)]
    assert isinstance(policy, DQNPolicy)
    target = _q_net("target", policy.q_net_target)
    return [_q_net("q_net", policy.q_net, policy.optimizer, target)]


def check_model(model: BaseAlgorithm) -> None:
    """One line where the callback does not know the algorithm."""
    if not isinstance(model, PPO | A2C | SAC | DQN):
        raise ValueError(
            f"PlasticityCallback knows PPO, A2C, SAC and DQN, not {type(model).__name__}; use "
            f"find_units and attach on its networks and optimizers"
        )


def example_of(policy: BasePolicy) -> Batch:
    """A batch for the probe: one row of zeros."""
    obs = obs_as_tensor(_zeros(policy.observation_space), policy.device)
    return obs, torch.zeros(1, *(policy.action_space.shape or (1,)), device=policy.device)


def measured_batch(model: BaseAlgorithm) -> Batch | None:
    """Up to 512 stored observations, evenly spaced over the rollout or the replay memory, and the
    actions taken there; draws nothing from any random stream. None while nothing is stored."""
    buffer = getattr(model, "rollout_buffer", None) or getattr(model, "replay_buffer", None)
    if not isinstance(buffer, RolloutBuffer | ReplayBuffer):
        return None
    filled = buffer.size() * model.n_envs
    if not filled:
        return None
    rows = min(_ROWS, filled)
    places = [row * filled // rows for row in range(rows)]
    lead = buffer.actions.ndim - 1  # a rollout is flattened while it is used
    step = [place // model.n_envs for place in places]
    index = (places,) if lead == 1 else (step, [place % model.n_envs for place in places])
    stored = buffer.observations
    obs = {k: v[index] for k, v in stored.items()} if isinstance(stored, dict) else stored[index]
    normalizer = model.get_vec_normalize_env()
    if isinstance(buffer, ReplayBuffer) and normalizer is not None:  # it stores raw observations
        obs = normalizer.normalize_obs(obs)
    actions = torch.as_tensor(buffer.actions[index], device=model.device)
    return obs_as_tensor(obs, model.device), actions


def mark_inits(policy: ActorCriticPolicy) -> None:
    """Note how SB3 drew the layers of an on-policy policy, so that recycled units are drawn the
    same: orthogonal with gain sqrt(2), heads 0.01 and 1, biases 0. Its other policies leave layers
    as torch makes them."""
    if not policy.ortho_init:
        return
    gains: list[tuple[nn.Module, float]] = [
        (policy.pi_features_extractor, math.sqrt(2)),
        (policy.vf_features_extractor, math.sqrt(2)),
        (policy.mlp_extractor, math.sqrt(2)),
        (policy.action_net, 0.01),
        (policy.value_net, 1.0),
    ]
    for root, gain in gains:
        for layer in root.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and not hasattr(layer, "init"):
                layer.init = Init("orthogonal", gain)  # type: ignore[assignment]


def _actor_critic(policy: ActorCriticPolicy) -> Network:
    mark_inits(policy)
    extractor = policy.mlp_extractor
    nets: dict[str, list[nn.Module]] = {}
    if policy.share_features_extractor:
        nets["features"] = [policy.features_extractor]
        nets["policy"] = [extractor.policy_net, policy.action_net]
        nets["value"] = [extractor.value_net, policy.value_net]
    else:
        nets["policy"] = [policy.pi_features_extractor, extractor.policy_net, policy.action_net]
        nets["value"] = [policy.vf_features_extractor, extractor.value_net, policy.value_net]

    def forward(batch: Batch) -> Any:
        features = policy.extract_features(batch[0])
        if not isinstance(features, tuple):
            features = features, features
        latent = extractor.forward_actor(features[0])
        values = policy.value_net(extractor.forward_critic(features[1]))
        # State dependent noise reads the last hidden layer beside the head.
        return policy.action_net(latent), values, latent if policy.use_sde else None

    return Network("policy", policy, nets, forward, policy.optimizer)


def _actor(policy: SACPolicy) -> Network:
    actor, critic = policy.actor, policy.critic
    heads = [head for head in (actor.mu, actor.log_std) if isinstance(head, nn.Module)]
    nets: dict[str, list[nn.Module]] = {
        "actor": [actor.features_extractor, actor.latent_pi, *heads]
    }
    shared = critic.share_features_extractor

    def forward(batch: Batch) -> Any:
        parameters = actor.get_action_dist_params(batch[0])
        # Where the critic reads the actor's features, their outgoing weights are its weights too.
        return parameters, critic(*batch) if shared else None

    module = nn.ModuleList([actor, critic]) if shared else actor
    return Network("actor", module, nets, forward, actor.optimizer)


def _twins(name: str, critic: ContinuousCritic, target: Network | None = None) -> Network:
    nets: dict[str, list[nn.Module]] = {}
    if not critic.share_features_extractor:
        nets["features"] = [critic.features_extractor]
    nets |= {f"qf{place}": [net] for place, net in enumerate(critic.q_networks)}
    optimizer = getattr(critic, "optimizer", None)
    return Network(name, critic, nets, lambda batch: critic(*batch), optimizer, target)


def _q_net(
    name: str, net: QNetwork, optimizer: Optimizer | None = None, target: Network | None = None
) -> Network:
    nets: dict[str, list[nn.Module]] = {"q_net": [net.features_extractor, net.q_net]}
    return Network(name, net, nets, lambda batch: net(batch[0]), optimizer, target)


def _zeros(space: spaces.Space) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _zeros(part) for key, part in space.items()}
    return np.zeros((1, *(space.shape or ())), space.dtype)
