"""Tiny stock Stable-Baselines3 models on real environments, and what their future depends on."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

Streams = list[Callable[[], Any]]
KINDS = ("ppo", "sac", "dqn")
STEPS = {"ppo": 64, "sac": 32, "dqn": 32}  # env steps of a stretch: about 16 optimizer steps
_ON = {"n_steps": 32, "batch_size": 16, "n_epochs": 4}
_OFF = {"learning_starts": 16, "batch_size": 16, "buffer_size": 200, "train_freq": 1}
# Exploration that does not depend on how long learn() is told to be.
_EPSILON = {"exploration_initial_eps": 0.2, "exploration_final_eps": 0.2}


class Dots(gym.Env):
    """A bright square on a small grey image moves left or right; its place is the reward."""

    observation_space = gym.spaces.Box(0, 255, (1, 36, 36), np.uint8)

    def __init__(self, continuous: bool = False) -> None:
        box, discrete = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)
        self.action_space = box if continuous else discrete
        self.place = self.clock = 0

    def _image(self) -> np.ndarray:
        image = np.zeros((1, 36, 36), np.uint8)
        image[0, 10:20, self.place : self.place + 10] = 255
        return image

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.place, self.clock = int(self.np_random.integers(26)), 0
        return self._image(), {}

    def step(self, action):
        right = float(np.asarray(action).reshape(-1)[0]) > 0
        self.place = int(np.clip(self.place + (3 if right else -3), 0, 25))
        self.clock += 1
        return self._image(), self.place / 25, False, self.clock >= 20, {}


def build(kind: str, *, env: Any = None, pixels: bool = False, **options: Any) -> BaseAlgorithm:
    """A model with nets of 8-8 ReLUs; the same weights and environment each time."""
    kwargs = {"net_arch": [8, 8], "activation_fn": torch.nn.ReLU} | options.pop("policy_kwargs", {})
    if pixels:
        kwargs = {"features_extractor_kwargs": {"features_dim": 16}} | kwargs
    given = {"seed": 0, "device": "cpu", "policy_kwargs": kwargs} | options
    policy = "CnnPolicy" if pixels else "MlpPolicy"
    if env is None:
        names = {"ppo": "Pendulum-v1", "sac": "Pendulum-v1", "dqn": "CartPole-v1"}
        env = Dots(continuous=kind == "sac") if pixels else names[kind]
    if kind == "ppo":
        return PPO(policy, env, **_ON | given)
    if kind == "sac":
        return SAC(policy, env, **_OFF | given)
    return DQN(policy, env, **_OFF | _EPSILON | {"target_update_interval": 7} | given)


def learn(
    model: BaseAlgorithm,
    callback: BaseCallback | Sequence[BaseCallback] | None = None,
    stretches: int = 1,
    *,
    again: bool = False,
) -> BaseAlgorithm:
    """Learn for some stretches; from fixed random streams, unless it goes on from before."""
    kind = type(model).__name__.lower()
    if not again:
        torch.manual_seed(1)
        np.random.seed(1)
    given = list(callback) if isinstance(callback, Sequence) else callback
    return model.learn(STEPS[kind] * stretches, callback=given, reset_num_timesteps=not again)


def everything(model: BaseAlgorithm) -> dict[str, Tensor]:
    """Weights, targets, temperature, optimizers and random streams, flat."""
    found: dict[str, Tensor] = {}
    found |= _flat("parameters", model.get_parameters())
    names = model._get_torch_save_params()[1]
    found |= {name: getattr(model, name).detach().clone() for name in names}
    found["torch"] = torch.get_rng_state()
    found["numpy"] = torch.as_tensor(np.random.get_state()[1].astype(np.int64))
    found |= _flat("plasticity", getattr(model, "plasticity", None) or {})
    return found


def weights(model: BaseAlgorithm) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.policy.named_parameters()}


def differences(some: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """Keys that are not bitwise equal in both."""
    return sorted(
        key
        for key in some.keys() | others.keys()
        if key not in some or key not in others or not torch.equal(some[key], others[key])
    )


def reload(model: BaseAlgorithm, streams: Streams | None = None) -> BaseAlgorithm:
    """The model after stock save and load; with what SB3 does not save handed over: environment,
    replay memory and random streams (as they are now, or as given)."""
    file, streams = io.BytesIO(), streams or random_streams()
    model.seed = None  # load() would seed everything again
    model.save(file)
    file.seek(0)
    loaded = type(model).load(file, env=model.env, device="cpu", force_reset=False)
    if hasattr(model, "replay_buffer"):
        loaded.replay_buffer = copy.deepcopy(model.replay_buffer)
    for restore in streams:
        restore()
    return loaded


def random_streams() -> Streams:
    """Calls that put the random streams back to where they are now."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    setters = torch.set_rng_state, np.random.set_state, random.setstate
    return [lambda s=state, f=setter: f(s) for state, setter in zip(states, setters, strict=True)]


def _flat(prefix: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix: value.detach().clone()}
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return {prefix: torch.tensor(float(value or 0))} if not isinstance(value, str) else {}
    return {k: v for key, part in items for k, v in _flat(f"{prefix}.{key}", part).items()}


class Watch(BaseCallback):
    """Looks at the model around the callback that stands between two of them, at every optimizer
    step: `before` the methods act and `after`, in the pre or the post hooks of the optimizers.

    Args:
        look: called with the name of the optimizer's network.
        post: after optimizer steps, else before them.
    """

    def __init__(self, look: Callable[[str], None], *, post: bool) -> None:
        super().__init__()
        self.look, self.post = look, post
        self.hooks: list[Any] = []

    def _on_training_start(self) -> None:
        for name, optimizer in optimizers(self.model).items():
            kind = "post" if self.post else "pre"
            register = getattr(optimizer, f"register_step_{kind}_hook")
            self.hooks.append(register(lambda *_, name=name: self.look(name)))

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        for hook in self.hooks:
            hook.remove()


def optimizers(model: BaseAlgorithm) -> dict[str, torch.optim.Optimizer]:
    """Those that own units."""
    if isinstance(model, SAC):
        return {"actor": model.actor.optimizer, "critic": model.critic.optimizer}
    return {"q_net" if isinstance(model, DQN) else "policy": model.policy.optimizer}
