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

from perennial.plasticity import registry
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.base import Intervention
from perennial.plasticity.branches import Frozen, branches_of
from perennial.plasticity.copies import Init
from perennial.plasticity.injection import PlasticityInjection
from perennial.plasticity.sb3_networks import Network, example_of, networks_of


class _Rewritten:
    """What the classes below have in common.

    Args:
        rewrites: specs of the methods that change the networks, and of `injection`, whose frozen
            heads belong to the policy. All other arguments are those of SB3's class.
    """

    def __init__(self, *args: Any, rewrites: Sequence[str] = (), **kwargs: Any) -> None:
        self.rewrites = tuple(rewrites)  # super builds the networks
        super().__init__(*args, **kwargs)
        specs = [spec for spec in self.rewrites if _injects(spec)]
        for network in networks_of(self._policy) if specs else ():
            _inject(self._policy, network, [registry.make(spec) for spec in specs])

    @property
    def _policy(self) -> BasePolicy:
        assert isinstance(self, BasePolicy)
        return self

    def _get_constructor_parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = super()._get_constructor_parameters()  # type: ignore[misc]
        return found | {"rewrites": self.rewrites}

    def get_extra_state(self) -> dict[str, Any]:
        """Frozen heads, which are no modules of the policy: so that a loaded policy predicts."""
        return {
            name: {"used": frozen.used, "heads": frozen.state_dict()}
            for name, frozen in _frozen_heads(self._policy).items()
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, frozen in _frozen_heads(self._policy).items():
            if name in state:
                frozen.load_state_dict(state[name]["heads"])
                frozen.used = state[name]["used"]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for frozen in _frozen_heads(self._policy).values():  # `to(device)` takes them along
            frozen._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]


class RewrittenActorCriticPolicy(_Rewritten, ActorCriticPolicy):
    """Policy of PPO and A2C with networks changed by `rewrites` (specs: `["layer-norm"]`).

    SB3's orthogonal initialisation comes after; layers that say how they are drawn keep that.
    """

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        rewrite(self, self.rewrites)  # the features extractor too, which stands by now

    @staticmethod
    def init_weights(module: nn.Module, gain: float = 1) -> None:
        if not isinstance(getattr(module, "init", None), Init):
            ActorCriticPolicy.init_weights(module, gain)


class RewrittenSACPolicy(_Rewritten, SACPolicy):
    """Policy of SAC with actor, critics and target critics changed by `rewrites`."""

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        return rewrite(super().make_actor(features_extractor), self.rewrites)

    def make_critic(
        self, features_extractor: BaseFeaturesExtractor | None = None
    ) -> ContinuousCritic:
        critic = super().make_critic(features_extractor)
        # A features extractor that is handed in is the actor's, and changed already.
        twins = nn.ModuleList(critic.q_networks)
        rewrite(critic if features_extractor is None else twins, self.rewrites)
        return critic


class RewrittenDQNPolicy(_Rewritten, DQNPolicy):
    """Policy of DQN with network and target network changed by `rewrites`."""

    def make_q_net(self) -> QNetwork:
        return rewrite(super().make_q_net(), self.rewrites)


_REWRITTEN: tuple[tuple[type[BasePolicy], type[BasePolicy]], ...] = (
    (ActorCriticPolicy, RewrittenActorCriticPolicy),
    (SACPolicy, RewrittenSACPolicy),
    (DQNPolicy, RewrittenDQNPolicy),
)


def belongs_to_policy(method: Intervention) -> bool:
    """Whether SB3 has to make a method's part of the policy when it loads one."""
    return method.rewrites or isinstance(method, PlasticityInjection)


def rebuild(model: BaseAlgorithm, specs: Sequence[str]) -> None:
    """Give a model the policy that `specs` describe, where it has another one.

    Networks, optimizers, target networks, the model's aliases of them, its `policy_class` and
    `policy_kwargs` are made anew. Layers that stay as they were are drawn as `model.seed` draws
    them without the methods; where only `injection` joins, weights and optimizers are taken over.
    A model that has these methods already (it was loaded, or learns on) is left alone; those that
    it has stay when they are not named again.

    Raises:
        ValueError: one line; the model has trained with other networks, its policy is no stock one,
            or a method does not fit its networks.
    """
    present: Sequence[str] = model.policy_kwargs.get("rewrites", ())
    old, had = _sorted(present)
    new, has = _sorted(specs)
    new, has = new or old, has or had
    same, trained = _equal(new, old), bool(model._n_updates)
    if same and _equal(has, had):
        return
    if trained and (not same or had):
        built = f"was built with {', '.join(present)}" if present else "was built without"
        raise ValueError(
            f"{', '.join(specs)} changes the network, and this model {built} and has trained "
            f"{model._n_updates} updates: begin with a new model"
        )
    policy_class, before = _rewritten(model), model.policy
    kwargs = model.policy_kwargs | {
        "features_extractor_class": before.features_extractor_class,
        "rewrites": (*new, *has),
    }
    given = {"use_sde": model.use_sde} if isinstance(model, OnPolicyAlgorithm) else {}
    spaces = model.observation_space, model.action_space
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(torch.initial_seed() if model.seed is None else model.seed)
        policy = policy_class(*spaces, model.lr_schedule, **given, **kwargs).to(model.device)
    if same:
        _take_over(policy, before)
    model.policy, model.policy_class, model.policy_kwargs = policy, policy_class, kwargs
    _renew_aliases(model)


def _take_over(policy: BasePolicy, before: BasePolicy) -> None:
    """Weights and optimizers of a policy with the same networks."""
    policy.load_state_dict(before.state_dict(), strict=False)
    for network, other in zip(networks_of(policy), networks_of(before), strict=True):
        if network.optimizer is not None and other.optimizer is not None:
            network.optimizer.load_state_dict(other.optimizer.state_dict())


def _renew_aliases(model: Any) -> None:
    """What else an off-policy model keeps of its policy."""
    policy = model.policy
    online: nn.Module
    target: nn.Module
    if isinstance(policy, SACPolicy):
        online, target = policy.critic, policy.critic_target
    elif isinstance(policy, DQNPolicy):
        online, target = policy.q_net, policy.q_net_target
    else:
        return
    model._create_aliases()
    model.batch_norm_stats = get_parameters_by_name(online, ["running_"])
    model.batch_norm_stats_target = get_parameters_by_name(target, ["running_"])


def _injects(spec: str) -> bool:
    return registry.parse_spec(spec)[0] == PlasticityInjection.name


def _sorted(specs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that change the networks, and injections."""
    return [s for s in specs if not _injects(s)], [s for s in specs if _injects(s)]


def _equal(some: Sequence[str], others: Sequence[str]) -> bool:
    return list(map(registry.parse_spec, some)) == list(map(registry.parse_spec, others))


def _inject(policy: BasePolicy, network: Network, injections: Sequence[Intervention]) -> None:
    """Put the hooks of injected heads on a network; the heads are empty as yet."""
    assert network.optimizer is not None
    units, every = network.find(example_of(policy), network.optimizer)
    network.attach([m for m in injections if network.concerns(m)], units).detach()
    every.close()


def _frozen_heads(policy: BasePolicy) -> dict[str, Frozen]:
    """By the name of the network that they are on."""
    found = {}
    for network in networks_of(policy):
        for module in network.module.modules():
            for branches in branches_of(module):
                found[network.name] = branches.frozen
    return found


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
