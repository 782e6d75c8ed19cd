"""Protocols of games that change: one agent in a cycle of Atari games, replay kept, no task given.

Where a protocol says nothing of an agent, DQN's numbers are those of Dopamine's DQN and Rainbow
(Castro et al. 2018, its jax `dqn.gin` and `rainbow.gin`) and PPO's those of CORA's baseline.
Everything else is as Machado et al. 2018 recommend: see `perennial list envs`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from perennial.agents.dqn_config import DQNConfig
from perennial.agents.ppo_config import PPOConfig
from perennial.agents.settings import Preset

_ENV = "perennial/AtariSwitch-v0"
_DECAY, _MINI_DECAY = 250_000, 25_000  # env steps in which epsilon falls

_DQN = DQNConfig(
    env=_ENV,
    learning_rate=6.25e-5,
    adam_eps=1.5e-4,
    betas=(0.9, 0.999),
    buffer_size=1_000_000,
    learning_starts=20_000,
    batch_size=32,
    gamma=0.99,
    train_freq=4,
    gradient_steps=1,
    tau=1.0,
    target_update_interval=8_000,
    exploration_initial_eps=1.0,
    exploration_final_eps=0.01,
    eps_restart=False,
    max_grad_norm=None,
    n_step=1,
    double=False,
    dueling=False,
    prioritized_replay=False,
    at_change="keep",
    value_loss="mse",
    reward_clip="1",
)
# What Dopamine's Rainbow adds to its DQN.
_RAINBOW: dict[str, Any] = {
    "value_loss": "c51:low=-10,high=10,bins=51",
    "n_step": 3,
    "prioritized_replay": True,
    "prioritized_replay_alpha": 0.5,
    "prioritized_replay_beta0": 0.5,
}
_PPO = PPOConfig(
    env=_ENV,
    num_envs=8,
    learning_rate=2.5e-4,
    n_steps=128,
    batch_size=256,
    n_epochs=4,
    gamma=0.99,
    gae_lambda=0.95,
    clip_range=0.1,
    ent_coef=0.01,
    vf_coef=0.5,
    max_grad_norm=0.5,
    advantage_norm="minibatch",
    adam_eps=1e-5,
    reward_clip="1",
)

_ABBAS: dict[str, Any] = {
    "env_args": {
        "games": ("Alien", "Atlantis", "Boxing", "Breakout", "Centipede"),
        "change_every": 5_000_000,
    },
    "steps": 125_000_000,
}
_ABBAS_SOURCE = (
    "Abbas, Zhao, Modayil, White, Machado: Loss of plasticity in continual deep RL, CoLLAs 2023 "
    "(arXiv 2303.07507). It has no public code: games and lengths are from memory, not checked"
)
_COMPRESS: dict[str, Any] = {
    "env_args": {
        "games": ("SpaceInvaders", "Krull", "BeamRider", "Hero", "StarGunner", "MsPacman"),
        "change_every": 12_500_000,
        "max_frames": 40_000,
    },
    "steps": 375_000_000,
}
_COMPRESS_SOURCE = (
    "Schwarz et al.: Progress & Compress, ICML 2018 (arXiv 1805.06370), lengths as in the code of "
    "Powers et al.: CORA, CoLLAs 2022 (arXiv 2110.10067); but sticky actions, no end at a lost life"
)
_MINI: dict[str, Any] = {
    "env_args": {"games": ("SpaceInvaders", "BeamRider", "MsPacman"), "change_every": 50_000},
    "steps": 450_000,
}
_MINI_SOURCE = "games of CORA's mini_atari_3_tasks_3_cycles; lengths and replay are ours"


def _presets(
    name: str, dqn: DQNConfig, ppo: PPOConfig, about: str, source: str
) -> dict[str, Preset]:
    """Under `name` DQN with plain values and PPO, and under `name-c51` what Rainbow adds."""
    rainbow = dataclasses.replace(dqn, **_RAINBOW)
    return {
        name: Preset((dqn, ppo), about, source),
        f"{name}-c51": Preset((rainbow,), f"as {name}, Dopamine's Rainbow", source),
    }


ATARI_PRESETS = {
    **_presets(
        "abbas-atari-cycle",
        dataclasses.replace(_DQN, **_ABBAS, exploration_fraction=_DECAY / 125_000_000),
        dataclasses.replace(_PPO, **_ABBAS),
        "5 games, 5 visits of 20M frames to each; DQN's replay takes 7 GB",
        _ABBAS_SOURCE,
    ),
    **_presets(
        "progress-compress-6",
        dataclasses.replace(_DQN, **_COMPRESS, exploration_fraction=_DECAY / 375_000_000),
        dataclasses.replace(_PPO, **_COMPRESS, lr_schedule="linear"),
        "6 games, 5 visits of 50M frames to each; DQN's replay takes 7 GB",
        _COMPRESS_SOURCE,
    ),
    **_presets(
        "atari-mini-cycle",
        dataclasses.replace(
            _DQN,
            **_MINI,
            exploration_fraction=_MINI_DECAY / 450_000,
            buffer_size=50_000,
            learning_starts=5_000,
            target_update_interval=2_000,
            learning_rate=1e-4,
        ),
        dataclasses.replace(_PPO, **_MINI),
        "3 games, 3 visits of 200k frames to each: for 2 cores",
        _MINI_SOURCE,
    ),
}
