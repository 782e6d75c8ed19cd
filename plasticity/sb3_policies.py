"""Stable-Baselines3's policies with rewritten networks, and a model rebuilt with one.

SB3 saves a model's policy class by name with its arguments, and makes the policy anew when it
loads: so the classes stand at the top of a module and take the rewriting methods as an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import get_parameters_by_name
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn

from perennial.plasticity.architecture import rewrite
from perennial.plasticity.copies import Init
from perennial.plasticity.registry import parse_spec


class RewrittenActorCriticPolicy(ActorCriticPolicy):
    """Policy of PPO and A2C whose networks were changed by `rewrites` (specs: `"layer-norm"`).

    SB3's orthogonal initialisation comes after; layers that say how they are drawn keep that. All
    other arguments are `ActorCriticPolicy`'s.
    """

    def __init__(self, *args: Any, rewrites: Sequence[str] = (), **kwargs: Any) -> None:
        self.rewrites = tuple(rewrites)  # super builds the networks
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        rewrite(self, self.rewrites)  # the features extractor too, which stands by now

    @staticmethod
    def init_weights(module: nn.Module, gain: float = 1) -> None:
        if not isinstance(getattr(module, "init", None), Init):
            ActorCriticPolicy.init_weights(module, gain)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"rewrites": self.rewrites}


class RewrittenSACPolicy(SACPolicy):
    """Policy of SAC whose actor, critics and target critics were changed by `rewrites`.

    All other arguments are `SACPolicy`'s.
    """

    def __init__(self, *args: Any, rewrites: Sequence[str] = (), **kwargs: Any) -> None:
        self.rewrites = tuple(rewrites)
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        return rewrite(super().make_actor(features_extractor), self.rewrites)

    def make_critic(
        self, features_extractor: BaseFeaturesExtractor | None = None
    ) -> ContinuousCritic:
        critic = super().make_critic(features_extractor)
        # A features extractor that is handed in is the actor's, and changed already.
        rewrite(critic if features_extractor is None else _twins(critic), self.rewrites)
        return critic

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"rewrites": self.rewrites}


class RewrittenDQNPolicy(DQNPolicy):
    """Policy of DQN whose network and target network were changed by `rewrites`.

    All other arguments are `DQNPolicy`'s.
    """

    def __init__(self, *args: Any, rewrites: Sequence[str] = (), **kwargs: Any) -> None:
        self.rewrites = tuple(rewrites)
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> QNetwork:
        return rewrite(super().make_q_net(), self.rewrites)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"rewrites": self.rewrites}


_REWRITTEN: tuple[tuple[type[BasePolicy], type[BasePolicy]], ...] = (
    (ActorCriticPolicy, RewrittenActorCriticPolicy),
    (SACPolicy, RewrittenSACPolicy),
    (DQNPolicy, RewrittenDQNPolicy),
)


def rebuild(model: BaseAlgorithm, specs: Sequence[str]) -> None:
    """Give a model that has not trained yet the policy that `specs` describe, once.

    What is there before the first step is made anew: networks, optimizers, target networks, the
    model's aliases of them, its `policy_class` and `policy_kwargs`. Layers that stay as they were
    are drawn as `model.seed` draws them without the methods. A model that has the same changes
    already (it was loaded, or learns on) is left alone.

    Raises:
        ValueError: one line; the model has trained, its policy is no stock one, or a method does
            not fit its networks.
    """
    present = model.policy_kwargs.get("rewrites", ())
    if not specs or list(map(parse_spec, specs)) == list(map(parse_spec, present)):
        return
    if model._n_updates:
        had = f"was built with {', '.join(present)}" if present else "was built without"
        raise ValueError(
            f"{', '.join(specs)} changes the network, and this model {had} and has trained "
            f"{model._n_updates} updates: begin with a new model"
        )
    policy_class = _rewritten(model)
    kwargs = model.policy_kwargs | {
        "features_extractor_class": model.policy.features_extractor_class,
        "rewrites": tuple(specs),
    }
    given = {"use_sde": model.use_sde} if isinstance(model, OnPolicyAlgorithm) else {}
    spaces = model.observation_space, model.action_space
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(torch.initial_seed() if model.seed is None else model.seed)
        policy = policy_class(*spaces, model.lr_schedule, **given, **kwargs).to(model.device)
    model.policy, model.policy_class, model.policy_kwargs = policy, policy_class, kwargs
    if isinstance(policy, SACPolicy | DQNPolicy):
        model._create_aliases()  # type: ignore[attr-defined]
        online, target = (
            (policy.critic, policy.critic_target)
            if isinstance(policy, SACPolicy)
            else (policy.q_net, policy.q_net_target)
        )
        stats = get_parameters_by_name(online, ["running_"])
        model.batch_norm_stats = stats  # type: ignore[attr-defined]
        stats = get_parameters_by_name(target, ["running_"])
        model.batch_norm_stats_target = stats  # type: ignore[attr-defined]


def _rewritten(model: BaseAlgorithm) -> type[BasePolicy]:
    """The class to rebuild a model's policy with."""
    present = type(model.policy)
    for stock, rewritten in _REWRITTEN:
        if issubclass(present, stock):
            own = present is rewritten or present.__module__.startswith("stable_baselines3.")
            if own:
                return rewritten
    raise ValueError(
        f"methods that change the network know SB3's own policies, not {present.__name__}: call "
        f"perennial.plasticity.architecture.rewrite in its constructor instead"
    )


def _twins(critic: ContinuousCritic) -> nn.ModuleList:
    return nn.ModuleList(critic.q_networks)
