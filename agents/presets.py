"""Published protocols as named starting points: `perennial train ppo --preset NAME`.

A protocol that is about the environment has a configuration for each of several agents.
"""

from __future__ import annotations

import dataclasses

from perennial.agents.atari_presets import ATARI_PRESETS
from perennial.agents.config import PPOConfig
from perennial.agents.primacy_presets import PRIMACY_PRESETS
from perennial.agents.settings import Preset

_NATURE = (
    "Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton: Loss of plasticity in deep continual "
    "learning, Nature 632 (2024), and its code"
)

# Said in full, so that a change of our defaults cannot change the protocol. Theirs: no gradient
# clipping (1e9), no normalisation, time limits as true terminals, raw Gaussian actions.
_NATURE_STANDARD = PPOConfig(
    env="perennial/SlipperyAnt-v0",
    env_args={
        "change_every": 2_000_000,
        "friction": (0.02, 2.0),
        "observation": "v3",
        "reference": "nature",
    },
    steps=20_000_000,
    learning_rate=1e-4,
    n_steps=2048,
    batch_size=128,
    n_epochs=10,
    gamma=0.99,
    gae_lambda=0.95,
    clip_range=0.2,
    advantage_norm="batch",
    ent_coef=0.0,
    vf_coef=1.0,
    max_grad_norm=None,
    betas=(0.9, 0.999),
    adam_eps=1e-8,
    timeout="terminal",
    norm_obs=False,
    norm_reward=False,
    clip_actions=False,
    net_arch=(256, 256),
    activation="relu",
    init="lecun",
    log_std_init=0.0,
)
_NATURE_TUNED = dataclasses.replace(_NATURE_STANDARD, betas=(0.99, 0.99))
_NATURE_CBP = "cbp:rate=1e-4,maturity=10000,decay=0.99,utility=contribution,reference=nature"

PRESETS: dict[str, Preset] = {
    "nature-slippery-ant-std": Preset(
        (_NATURE_STANDARD,), "slippery ant, standard PPO: betas 0.9, 0.999", _NATURE
    ),
    "nature-slippery-ant-ns": Preset(
        (_NATURE_TUNED,), "slippery ant, PPO tuned for change: betas 0.99, 0.99", _NATURE
    ),
    "nature-slippery-ant-l2": Preset(
        (dataclasses.replace(_NATURE_TUNED, plasticity=("l2:strength=1e-3",)),),
        "slippery ant, tuned PPO with L2 1e-3",
        _NATURE,
    ),
    "nature-slippery-ant-cbp": Preset(
        (dataclasses.replace(_NATURE_TUNED, plasticity=("l2:strength=1e-4", _NATURE_CBP)),),
        "slippery ant, tuned PPO with L2 1e-4 and continual backpropagation",
        _NATURE,
    ),
    **PRIMACY_PRESETS,
    **ATARI_PRESETS,
}
