"""The primacy bias: SAC that overfits its first transitions, and resets that repair it.

Nikishin et al. count resets in env steps, methods here in gradient steps: 32 times as many at 32
a step. Their tasks are those of dm_control; HalfCheetah stands for them, `--env` takes any other.
"""

from __future__ import annotations

import dataclasses

from perennial.agents.sac_config import SACConfig
from perennial.agents.settings import Preset

_SOURCE = (
    "Nikishin, Schwarzer, D'Oro, Bacon, Courville: The primacy bias in deep reinforcement "
    "learning, ICML 2022, and its code"
)

_SAC = SACConfig(
    env="HalfCheetah-v5",
    steps=2_000_000,
    learning_rate=3e-4,
    buffer_size=1_000_000,
    learning_starts=10_000,
    batch_size=256,
    tau=0.005,
    gamma=0.99,
    train_freq=1,
    gradient_steps=1,
    target_update_interval=1,
    n_step=1,
    ent_coef="auto",
    betas=(0.9, 0.999),
    adam_eps=1e-8,
    net_arch=(256, 256),
    activation="relu",
)
_RATIO, _EVERY = 32, 200_000  # updates per env step, env steps between resets
_MINI_RATIO, _MINI_EVERY = 4, 5_000

PRIMACY_PRESETS: dict[str, Preset] = {
    "primacy-bias": Preset(
        (dataclasses.replace(_SAC, gradient_steps=_RATIO),),
        "SAC with 32 updates per env step, no resets",
        _SOURCE,
    ),
    "primacy-bias-reset": Preset(
        (
            dataclasses.replace(
                _SAC, gradient_steps=_RATIO, plasticity=(f"reset:every={_RATIO * _EVERY}",)
            ),
        ),
        "the same, a whole new agent every 200k env steps, replay kept",
        _SOURCE,
    ),
    "primacy-bias-mini": Preset(
        (
            dataclasses.replace(
                _SAC,
                steps=30_000,
                learning_starts=1_000,
                gradient_steps=_MINI_RATIO,
                plasticity=(f"reset:every={_MINI_RATIO * _MINI_EVERY}",),
            ),
        ),
        "resets scaled to 2 cores: 4 updates per env step, reset every 5k",
        _SOURCE,
    ),
    "heavy-priming": Preset(
        (dataclasses.replace(_SAC, learning_starts=100, priming_steps=100_000),),
        "100k updates on the first 100 transitions, then SAC as usual",
        _SOURCE,
    ),
    "heavy-priming-mini": Preset(
        (dataclasses.replace(_SAC, steps=30_000, learning_starts=500, priming_steps=20_000),),
        "priming scaled to 2 cores: 20k updates on the first 500 transitions",
        _SOURCE,
    ),
}
