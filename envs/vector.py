"""The one way agents get environments: `make_vec` for our ids and for every registered one.

All speak the same: SAME_STEP autoreset, the seed's lanes in blocks, the lanes' tasks in infos,
`task_of(block)`, exact `get_state(block)` / `set_state(block, state)`, and `task_in(block, state)`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from perennial.envs import state as env_state
from perennial.envs.specs import ENVS, block_size, check_args, check_env


def make_vec(
    env_id: str,
    num_envs: int,
    *,
    schedule_seeds: Sequence[int],
    threads: int = 1,
    render_mode: str | None = None,
    **args: Any,
) -> gym.vector.VectorEnv[Any, Any, Any]:
    """A vector environment of `num_envs` lanes, in equal blocks for the seeds.

    Args:
        env_id: One of our ids or any registered one.
        num_envs: Lanes of all seeds together.
        schedule_seeds: One schedule per seed; how many there are says how many blocks.
        threads: Threads that step our own environments; foreign ones use one.
        render_mode: "rgb_array" makes `render()` return one frame per lane.
        args: The environment's parameters, as values or as command line strings.

    Raises:
        ValueError: One line: an unknown id or parameter, a value out of range, a missing extra.
    """
    check_env(env_id)
    parsed = check_args(env_id, args)
    block_size(num_envs, len(schedule_seeds))
    if render_mode is not None:  # many environments know no such argument
        parsed["render_mode"] = render_mode
    if env_id not in ENVS:
        return ForeignVectorEnv(env_id, num_envs, len(schedule_seeds), parsed)
    parsed["schedule_seed"] = [int(seed) for seed in schedule_seeds]
    return gym.make_vec(env_id, num_envs=num_envs, threads=threads, **parsed)


class ForeignVectorEnv(gym.vector.VectorEnv[Any, Any, Any]):
    """Any registered environment, stepped lane by lane, with what our agents ask of their own.

    It never changes: `infos["task"]` [N] is zero. Actions for a Box are cast to its dtype, never
    clipped. State is exact for what `perennial.envs.state` knows.

    Args:
        env_id: A registered id.
        num_envs: N.
        seeds: Blocks that the lanes divide into.
        args: Arguments of the environment; `max_episode_steps` replaces the registered limit.

    Raises:
        ValueError: The environment cannot be made; one line with its own reason.
    """

    def __init__(self, env_id: str, num_envs: int, seeds: int, args: Mapping[str, Any]) -> None:
        self.block_size = block_size(num_envs, seeds)

        def make() -> gym.Env[Any, Any]:
            return gym.make(env_id, disable_env_checker=True, **args)

        try:
            self._sync = SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        except (gym.error.Error, ImportError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(f"{env_id} cannot be made: {reason}") from error
        sync = self._sync
        self.num_envs = num_envs
        self.spec = sync.envs[0].spec
        self.metadata, self.render_mode = sync.metadata, sync.render_mode
        self.single_observation_space = sync.single_observation_space
        self.single_action_space = sync.single_action_space
        self.observation_space, self.action_space = sync.observation_space, sync.action_space
        self._tasks = np.zeros(num_envs, np.int64)
        self._tasks.flags.writeable = False
        box = self.single_action_space
        self._action_dtype = box.dtype if isinstance(box, gym.spaces.Box) else None

    @property
    def envs(self) -> Sequence[gym.Env[Any, Any]]:
        """Each lane's environment."""
        return self._sync.envs

    def reset(  # type: ignore[override]
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode in every lane; `seed` is one number per lane, or the first lane's."""
        seeds = seed if seed is None or isinstance(seed, int) else list(seed)
        observations, infos = self._sync.reset(seed=seeds, options=options)
        infos["task"] = self._tasks
        return observations, infos

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One env step of every lane."""
        if self._action_dtype is not None:
            actions = np.asarray(actions, dtype=self._action_dtype)
        observations, rewards, terminated, truncated, infos = self._sync.step(actions)
        infos["task"] = self._tasks
        return observations, rewards, terminated, truncated, infos

    def task_of(self, block: int) -> tuple[int, dict[str, float]]:
        """Task 0 without parameters: a foreign environment never changes."""
        return 0, {}

    def get_state(self, block: int) -> dict[str, Any]:
        """One seed's lanes: numpy arrays and JSON values; `["exact"]` says if they can go on."""
        lanes = [env_state.capture(env) for env in self._lanes(block)]
        return {"exact": all(lane["exact"] for lane in lanes), "lanes": lanes}

    def task_in(self, block: int, state: dict[str, Any]) -> int:
        """What `task_of` was when a `get_state` was taken: 0."""
        return 0

    def set_state(self, block: int, state: dict[str, Any]) -> NDArray[Any] | None:
        """Go on from a `get_state`.

        Returns:
            None where that was exact. Otherwise every lane began a fresh episode, and this is the
            block's first observations [block_size, ...].

        Raises:
            ValueError: The state is of another number of lanes or another environment.
        """
        if len(state["lanes"]) != self.block_size:
            held = len(state["lanes"])
            raise ValueError(f"the saved state has {held} lanes per seed, not {self.block_size}")
        fresh: list[Any] = [
            env_state.restore(env, lane)
            for env, lane in zip(self._lanes(block), state["lanes"], strict=True)
        ]
        return None if state["exact"] else np.stack(fresh)

    def _lanes(self, block: int) -> Sequence[gym.Env[Any, Any]]:
        first = block * self.block_size
        return self._sync.envs[first : first + self.block_size]

    def render(self) -> tuple[Any, ...]:
        """One frame per lane."""
        return self._sync.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Close the lanes."""
        self._sync.close(**kwargs)
