"""Many slippery ants stepped together, in blocks of lanes that belong to one seed each."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from perennial.envs.ant import ACTION_SIZE, Floats
from perennial.envs.slippery_ant import (
    ENV_ID,
    RENDER_FPS,
    check_render_mode,
    make_clock,
    make_lanes,
    make_renderer,
    make_spaces,
)
from perennial.envs.specs import block_size, check_args
from perennial.envs.state import generator_from_state


class SlipperyAntVectorEnv(gym.vector.VectorEnv[Floats, NDArray[Any], NDArray[Any]]):
    """Many slippery ants stepped together (`gym.make_vec("perennial/SlipperyAnt-v0", ...)`).

    N = `num_envs` lanes belong in equal blocks to the seeds of `schedule_seed`. The clock of a seed
    counts the env steps of all its lanes; a lane enters a new task at its own next episode (with
    change="now": at once). Autoreset is SAME_STEP: a lane that ended returns the new episode's
    first observation, `final_obs` and `final_info` tell of the old one. Every step returns new
    arrays, but `infos["task"]` [N] and `infos["task_params"]["friction"]` [N] are read-only and
    shared between steps until a lane changes its task.

    Args as `SlipperyAntEnv`, and:
        num_envs: N.
        schedule_seed: One seed, or several of which `num_envs` is a multiple.
        max_episode_steps: Time limit; None: no limit.
        threads: Threads that step the lanes.
        render_mode: None or "rgb_array" (one frame per lane).
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": RENDER_FPS,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        change_every: int = 2_000_000,
        friction: tuple[float, float] = (0.02, 2.0),
        frictions: Sequence[float] | None = None,
        schedule: str = "log-uniform",
        schedule_seed: int | Sequence[int] = 0,
        period: int | None = None,
        change: str = "episode",
        reference: str | None = None,
        task: int | None = None,
        observation: str = "v5",
        contact_cost: bool | None = None,
        max_episode_steps: int | None = 1000,
        threads: int = 1,
        render_mode: str | None = None,
    ) -> None:
        args = check_args(
            ENV_ID,
            {
                "change_every": change_every,
                "friction": friction,
                "frictions": frictions,
                "schedule": schedule,
                "period": period,
                "change": change,
                "reference": reference,
                "task": task,
                "observation": observation,
                "contact_cost": contact_cost,
                "max_episode_steps": max_episode_steps,
            },
        )
        check_render_mode(render_mode, self.metadata["render_modes"])
        seeds = [schedule_seed] if isinstance(schedule_seed, int | np.integer) else schedule_seed
        self.num_envs = num_envs
        self.block_size = block_size(num_envs, len(seeds))
        self._clocks = [make_clock(args, seed) for seed in seeds]
        self._at_once = args["change"] == "now"
        self._limit = args["max_episode_steps"]
        self._lanes = make_lanes(args, num_envs, threads)
        self.single_observation_space, self.single_action_space = make_spaces(self._lanes)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self._renderers: list[Any] = []
        self._rngs = [np.random.default_rng() for _ in range(num_envs)]
        self._elapsed = [0] * num_envs
        self._tasks = [clock.task for clock in self._clocks for _ in range(self.block_size)]
        self._frictions = [0.0] * num_envs
        for lane, its_task in enumerate(self._tasks):
            self._enter(lane, its_task)
        self._announce()

    @property
    def models(self) -> list[Any]:
        """Each lane's MuJoCo model."""
        return self._lanes.models

    @property
    def datas(self) -> list[Any]:
        """Each lane's MuJoCo data."""
        return self._lanes.datas

    def _enter(self, lane: int, task: int) -> None:
        self._tasks[lane] = task
        self._frictions[lane] = self._clocks[lane // self.block_size].schedule.value(task)
        self._lanes.set_friction(lane, self._frictions[lane])

    def _announce(self) -> None:
        """Write the lanes' tasks into the arrays that infos share until the next change."""
        self._task_info = np.array(self._tasks, np.int64)
        self._param_info = {"friction": np.array(self._frictions)}
        self._task_info.flags.writeable = False
        self._param_info["friction"].flags.writeable = False

    def _start(self, lane: int) -> Floats:
        task = self._clocks[lane // self.block_size].episode_end()
        if task != self._tasks[lane]:
            self._enter(lane, task)
            self._announce()
        self._elapsed[lane] = 0
        return self._lanes.reset(lane, self._rngs[lane])

    def _infos(self) -> dict[str, Any]:
        return {"task": self._task_info, "task_params": dict(self._param_info)}

    def reset(  # type: ignore[override]
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Floats, dict[str, Any]]:
        """Start an episode in every lane.

        Args:
            seed: Reseeds the physics: one number per lane, or the first lane's, others count on.
            options: {"restart": True} starts the clocks again.
        """
        if seed is not None:
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
            if len(seeds) != self.num_envs:
                raise ValueError(
                    f"reset takes {self.num_envs} seeds, one per lane; got {len(seeds)}"
                )
            for lane, number in enumerate(seeds):
                if number is not None:
                    self._rngs[lane] = seeding.np_random(int(number))[0]
        if options and options.get("restart"):
            for clock in self._clocks:
                clock.restart()
        return np.stack([self._start(lane) for lane in range(self.num_envs)]), self._infos()

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[Floats, Floats, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One env step of every lane: observations [N, D], rewards, two flags [N], infos."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs, ACTION_SIZE):
            wanted = (self.num_envs, ACTION_SIZE)
            raise ValueError(f"actions have shape {wanted}; got {actions.shape}")
        obs, rewards, terminated = self._lanes.step(actions)
        elapsed = self._elapsed = [count + 1 for count in self._elapsed]
        limit = self._limit
        truncated = [limit is not None and count >= limit for count in elapsed]
        infos = self._infos()  # of this transition; a change may come now
        for block, clock in enumerate(self._clocks):
            if clock.advance(self.block_size) and self._at_once:
                for lane in range(block * self.block_size, (block + 1) * self.block_size):
                    self._enter(lane, clock.task)
                self._announce()
        if True in terminated or True in truncated:
            ended = [a or b for a, b in zip(terminated, truncated, strict=True)]
            infos = self._autoreset(obs, ended, infos)
        elif self._at_once:
            infos = self._infos()
        return obs, np.array(rewards), np.array(terminated), np.array(truncated), infos

    def _autoreset(
        self, obs: Floats, ended: list[bool], final_info: dict[str, Any]
    ) -> dict[str, Any]:
        """Start the ended lanes' next episodes, in `obs` too; the infos of this step."""
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane, over in enumerate(ended):
            if over:
                final_obs[lane] = obs[lane].copy()
                obs[lane] = self._start(lane)
        mask = np.array(ended)
        return {
            **self._infos(),
            "final_obs": final_obs,
            "_final_obs": mask,
            "final_info": final_info,
            "_final_info": mask.copy(),
        }

    def task_of(self, block: int) -> tuple[int, dict[str, float]]:
        """The schedule's task of one seed now, and its parameters; lanes enter it one by one."""
        clock = self._clocks[block]
        return clock.task, {"friction": clock.value}

    def get_state(self, block: int) -> dict[str, Any]:
        """What determines one seed's lanes from here on: numpy arrays and JSON values."""
        lanes = range(block * self.block_size, (block + 1) * self.block_size)
        return {
            "exact": True,
            "clock": self._clocks[block].get_state(),
            "elapsed": self._elapsed[lanes.start : lanes.stop],
            "tasks": self._tasks[lanes.start : lanes.stop],
            "lanes": [self._lanes.get_state(lane) for lane in lanes],
            "rngs": [self._rngs[lane].bit_generator.state for lane in lanes],
        }

    def task_in(self, block: int, state: dict[str, Any]) -> int:
        """What `task_of` was when a `get_state` was taken."""
        clock = copy.copy(self._clocks[block])
        clock.set_state(state["clock"])
        return clock.task

    def set_state(self, block: int, state: dict[str, Any]) -> None:
        """Go on from a `get_state` bit for bit; no reset is needed.

        Raises:
            ValueError: The state is of another number of lanes or another model.
        """
        if len(state["lanes"]) != self.block_size:
            held = len(state["lanes"])
            raise ValueError(f"the saved state has {held} lanes per seed, not {self.block_size}")
        self._clocks[block].set_state(state["clock"])
        first = block * self.block_size
        for i in range(self.block_size):
            self._elapsed[first + i] = int(state["elapsed"][i])
            self._enter(first + i, int(state["tasks"][i]))
            self._lanes.set_state(first + i, state["lanes"][i])
            self._rngs[first + i] = generator_from_state(state["rngs"][i])
        self._announce()

    def render(self) -> tuple[Any, ...] | None:
        """One frame [480, 480, 3] uint8 per lane."""
        if self.render_mode is None:
            return None
        if not self._renderers:
            self._renderers = [make_renderer(self._lanes, lane) for lane in range(self.num_envs)]
        return tuple(renderer.render(self.render_mode) for renderer in self._renderers)

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads and close the renderers."""
        self._lanes.close()
        for renderer in self._renderers:
            renderer.close()
        self._renderers = []
