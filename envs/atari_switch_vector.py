"""Many changing consoles stepped together, in blocks of lanes that belong to one seed each."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from perennial.envs.atari_games import ACTIONS, DEFAULT_GAMES, PARAM_NAMES, SIDE, Tour
from perennial.envs.atari_switch import (
    FRAMES_PER_SECOND,
    Frames,
    check_state,
    checked,
    make_spaces,
)
from perennial.envs.specs import block_size

Floats = NDArray[np.float64]


class AtariSwitchVectorEnv(gym.vector.VectorEnv[Frames, NDArray[Any], NDArray[Any]]):
    """Many changing consoles (`gym.make_vec("perennial/AtariSwitch-v0", ...)`).

    N = `num_envs` lanes belong in equal blocks to the seeds of `schedule_seed`. The clock of a seed
    counts the env steps of all its lanes; a lane enters a new task at its own next episode (with
    change="now" all lanes are truncated at once). Autoreset is SAME_STEP: a lane that ended returns
    the new episode's first observation, `final_obs` and `final_info` tell of the old one. Every
    step returns new arrays, but `infos["task"]`, `infos["game"]` and the `infos["task_params"]`
    [N] are read-only and shared between steps until a lane changes its task.

    Args as `AtariSwitchEnv`, and:
        num_envs: N.
        schedule_seed: One seed, or several of which `num_envs` is a multiple.
        threads: Cores that play: this process and `threads - 1` helper processes (the emulator
            holds the GIL).
        render_mode: None or "rgb_array" (one picture per lane).
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": FRAMES_PER_SECOND // 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        games: Sequence[str] = DEFAULT_GAMES,
        modes: Sequence[int] | None = None,
        difficulties: Sequence[int] | None = None,
        change_every: int = 12_500_000,
        cycles: int | None = None,
        order: str = "given",
        change: str = "episode",
        task: int | None = None,
        repeat_action_probability: float = 0.25,
        frame_skip: int = 4,
        stack: int = 4,
        max_frames: int = 108_000,
        schedule_seed: int | Sequence[int] = 0,
        threads: int = 1,
        render_mode: str | None = None,
    ) -> None:
        args = checked(
            {
                "games": games,
                "modes": modes,
                "difficulties": difficulties,
                "change_every": change_every,
                "cycles": cycles,
                "order": order,
                "change": change,
                "task": task,
                "repeat_action_probability": repeat_action_probability,
                "frame_skip": frame_skip,
                "stack": stack,
                "max_frames": max_frames,
            },
            render_mode,
        )
        seeds = [schedule_seed] if isinstance(schedule_seed, int | np.integer) else schedule_seed
        self.num_envs = num_envs
        self.block_size = block_size(num_envs, len(seeds))
        self._tours = [Tour(args, seed) for seed in seeds]
        from perennial.envs.atari_bank import AtariBank

        self._at_once = args["change"] == "now"
        self._bank = AtariBank(
            num_envs,
            threads,
            args["frame_skip"],
            args["repeat_action_probability"],
            args["max_frames"],
        )
        self.single_observation_space, self.single_action_space = make_spaces(args["stack"])
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self._stack = np.zeros((num_envs, args["stack"], SIDE, SIDE), np.uint8)
        self._pictures = np.zeros((num_envs, SIDE, SIDE), np.uint8)
        self._lives, self._frames = np.zeros((2, num_envs), np.int64)
        self._tasks = [tour.clock.task for tour in self._tours for _ in range(self.block_size)]
        self._announce()

    def _tour(self, lane: int) -> Tour:
        return self._tours[lane // self.block_size]

    def _lanes(self, block: int) -> range:
        return range(block * self.block_size, (block + 1) * self.block_size)

    def _announce(self) -> None:
        """Write the lanes' tasks into the arrays that infos share until the next change."""
        entries = [self._tour(lane).entry(task) for lane, task in enumerate(self._tasks)]
        self._task_info = np.array(self._tasks, np.int64)
        self._game_info = np.array([entry.game for entry in entries], dtype=object)
        self._param_info = {
            name: np.array([entry.params[name] for entry in entries]) for name in PARAM_NAMES
        }
        for array in (self._task_info, self._game_info, *self._param_info.values()):
            array.flags.writeable = False

    def _start(self, lanes: Iterable[int]) -> None:
        """Start an episode in each of the lanes."""
        lanes = list(lanes)
        tasks = {lane: self._tour(lane).clock.episode_end() for lane in lanes}
        if any(self._tasks[lane] != task for lane, task in tasks.items()):
            for lane, task in tasks.items():
                self._tasks[lane] = task
            self._announce()
        entries = [(lane, self._tour(lane).entry(task)) for lane, task in tasks.items()]
        for lane, (picture, *counts) in zip(lanes, self._bank.start(entries), strict=True):
            self._stack[lane] = 0
            self._stack[lane, -1] = picture
            self._lives[lane], self._frames[lane] = counts

    def _infos(self) -> dict[str, Any]:
        return {
            "task": self._task_info,
            "task_params": dict(self._param_info),
            "game": self._game_info,
            "lives": self._lives.copy(),
            "frames": self._frames.copy(),
        }

    def reset(  # type: ignore[override]
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Frames, dict[str, Any]]:
        """Start an episode in every lane.

        Args:
            seed: Reseeds stickiness: one number per lane, or the first lane's, others count on.
            options: {"restart": True} starts the clocks again.
        """
        if seed is not None:
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
            if len(seeds) != self.num_envs:
                raise ValueError(
                    f"reset takes {self.num_envs} seeds, one per lane; got {len(seeds)}"
                )
            self._bank.seed(
                (i, int(number)) for i, number in enumerate(seeds) if number is not None
            )
        if options and options.get("restart"):
            for tour in self._tours:
                tour.clock.restart()
        self._start(range(self.num_envs))
        return self._stack.copy(), self._infos()

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[Frames, Floats, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One env step of every lane: observations [N, stack, 84, 84], points, flags [N], infos."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            held = f"{actions.dtype} {actions.shape}"
            raise ValueError(f"actions are whole numbers of shape ({self.num_envs},); got {held}")
        if actions.min() < 0 or actions.max() >= ACTIONS:
            raise ValueError(f"actions go from 0 to {ACTIONS - 1}; got {actions.tolist()}")
        steps = self._bank.step(actions.tolist(), self._pictures)
        self._stack[:, :-1] = self._stack[:, 1:]
        self._stack[:, -1] = self._pictures
        points, over, cut, lives, frames = zip(*steps, strict=True)
        self._lives[:], self._frames[:] = lives, frames
        rewards, terminated, truncated = np.array(points), np.array(over), np.array(cut)
        for block, tour in enumerate(self._tours):
            if tour.clock.advance(self.block_size) and self._at_once:
                due = tour.entry(tour.clock.task)
                for lane in self._lanes(block):
                    truncated[lane] |= not over[lane] and tour.entry(self._tasks[lane]) != due
        obs, infos = self._stack.copy(), self._infos()
        if terminated.any() or truncated.any():
            infos = self._autoreset(obs, terminated | truncated, infos)
        return obs, rewards, terminated, truncated, infos

    def _autoreset(
        self, obs: Frames, ended: NDArray[np.bool_], final_info: dict[str, Any]
    ) -> dict[str, Any]:
        """Start the ended lanes' next episodes, in `obs` too; the infos of this step."""
        final_obs = np.full(self.num_envs, None, dtype=object)
        lanes = np.flatnonzero(ended).tolist()
        for lane in lanes:
            final_obs[lane] = obs[lane].copy()
        self._start(lanes)
        obs[lanes] = self._stack[lanes]
        return {
            **self._infos(),
            "final_obs": final_obs,
            "_final_obs": ended,
            "final_info": final_info,
            "_final_info": ended.copy(),
        }

    def task_of(self, block: int) -> tuple[int, dict[str, float]]:
        """The schedule's task of one seed now, and its parameters; lanes enter it one by one."""
        tour = self._tours[block]
        return tour.clock.task, tour.entry(tour.clock.task).params

    def game_of(self, block: int) -> str:
        """The game of the schedule's task."""
        tour = self._tours[block]
        return tour.entry(tour.clock.task).game

    def get_state(self, block: int) -> dict[str, Any]:
        """What determines one seed's lanes from here on: numpy arrays and JSON values."""
        lanes = self._lanes(block)
        return {
            "exact": True,
            "clock": self._tours[block].clock.get_state(),
            "tasks": self._tasks[lanes.start : lanes.stop],
            "games": self._game_info[lanes.start : lanes.stop].tolist(),
            "lives": self._lives[lanes.start : lanes.stop].copy(),
            "frames": self._frames[lanes.start : lanes.stop].copy(),
            "stack": self._stack[lanes.start : lanes.stop].copy(),
            "lanes": self._bank.get_state(lanes),
        }

    def task_in(self, block: int, state: dict[str, Any]) -> int:
        """What `task_of` was when a `get_state` was taken; plays nothing."""
        clock = copy.copy(self._tours[block].clock)
        clock.set_state(state["clock"])
        return clock.task

    def set_state(self, block: int, state: dict[str, Any]) -> None:
        """Go on from a `get_state` bit for bit; no reset is needed. Replays the episodes so far.

        Raises:
            ValueError: The state is of another number of lanes, other games or another ale-py.
        """
        if len(state["lanes"]) != self.block_size:
            held = len(state["lanes"])
            raise ValueError(f"the saved state has {held} lanes per seed, not {self.block_size}")
        lanes, tour = self._lanes(block), self._tours[block]
        span = slice(lanes.start, lanes.stop)
        tasks = [int(task) for task in state["tasks"]]
        check_state(tour, tasks, state["games"], self._stack[span], state["stack"])
        tour.clock.set_state(state["clock"])
        self._tasks[span] = tasks
        self._bank.set_state(
            (lane, tour.entry(task), held)
            for lane, task, held in zip(lanes, tasks, state["lanes"], strict=True)
        )
        for name, array in (
            ("stack", self._stack),
            ("lives", self._lives),
            ("frames", self._frames),
        ):
            array[span] = state[name]
        self._announce()

    def render(self) -> tuple[Any, ...] | None:
        """One picture [210, 160, 3] uint8 per lane."""
        return None if self.render_mode is None else tuple(self._bank.render())

    def close_extras(self, **kwargs: Any) -> None:
        """End the helpers."""
        self._bank.close()
