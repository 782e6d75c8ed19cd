"""Environments that change: importing this package registers them with Gymnasium.

`gym.make` and `gym.make_vec` take their ids; `make_vec` here builds what the agents step: any
registered environment with exact state save and restore. Simulators load when one is built.
"""

from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register, registry

if TYPE_CHECKING:
    from perennial.envs.vector import make_vec

__all__ = ["make_vec"]


def __getattr__(name: str) -> Any:
    if name == "make_vec":
        from perennial.envs.vector import make_vec

        return make_vec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "perennial/SlipperyAnt-v0" not in registry:  # a reload of the module must not warn
    register(
        id="perennial/SlipperyAnt-v0",
        entry_point="perennial.envs.slippery_ant:SlipperyAntEnv",
        vector_entry_point="perennial.envs.slippery_ant_vector:SlipperyAntVectorEnv",
        max_episode_steps=1000,
    )
    register(
        id="perennial/AtariSwitch-v0",
        entry_point="perennial.envs.atari_switch:AtariSwitchEnv",
        vector_entry_point="perennial.envs.atari_switch_vector:AtariSwitchVectorEnv",
    )
