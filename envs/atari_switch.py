"""Atari games that change: one agent meets game after game (Abbas et al., CoLLAs 2023).

The protocol of Machado et al., JAIR 2018: all 18 actions in every game, sticky actions, no episode
ends with a life, raw points. Games come in cycles, as in Progress & Compress (Schwarz et al., 2018)
and CORA (Powers et al., 2022). A picture equals that of Gymnasium's `AtariPreprocessing` bit for
bit, but for the last one of an episode that ends within a skip: theirs pools frames of the step
before, ours shows the end. Stacks are padded with zeros, as Dopamine's are.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from perennial.envs.atari_games import ACTIONS, DEFAULT_GAMES, SIDE, Tour
from perennial.envs.specs import ENVS, check_args, check_env

ENV_ID = "perennial/AtariSwitch-v0"
FRAMES_PER_SECOND = 60

Frames = NDArray[np.uint8]


def checked(args: dict[str, Any], render_mode: str | None) -> dict[str, Any]:
    """All parameters, checked; ValueError in one line, also where ale-py is missing."""
    parsed = {**ENVS[ENV_ID].defaults, **check_args(ENV_ID, args)}
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode={render_mode}: choose rgb_array, or none")
    check_env(ENV_ID)
    return parsed


def make_spaces(stack: int) -> tuple[Any, Any]:
    """Of one lane: pictures [stack, 84, 84], the newest last, and the joystick's 18 actions."""
    observation = gym.spaces.Box(0, 255, (stack, SIDE, SIDE), np.uint8)
    return observation, gym.spaces.Discrete(ACTIONS)


class AtariSwitchEnv(gym.Env[Frames, np.int64]):
    """One console whose cartridge changes (`gym.make("perennial/AtariSwitch-v0", ...)`).

    Actions: 0 to 17, as ALE numbers them; what a game has no use for does nothing. Observations:
    uint8 [stack, 84, 84] grey, zeros before an episode's first picture. Reward: the game's own
    points; clipping is the learner's. One env step is `frame_skip` frames, and `change_every`
    counts env steps. `info["game"]` and `info["task"]` name what is played, `info["task_params"]`
    in numbers: `game` (its place in `games`), `mode`, `difficulty`; `info["lives"]` and
    `info["frames"]` are of this episode. An episode ends with the game, is truncated at
    `max_frames` and, with change="now", when another game is due.

    `reset(seed=...)` reseeds stickiness only and the clock goes on; `options={"restart": True}`
    starts the clock again. A seed also repeats the game's own start, which in some games differs a
    little from one episode to the next.

    Args:
        games: Names as in Gymnasium's "ALE/<name>-v5", in the order of a cycle.
        modes: Modes in which every game comes; None: the one it starts in.
        difficulties: Difficulties in which every game comes; None: the one it starts in.
        change_every: Env steps from one change to the next.
        cycles: How often the games come round; the last one then stays. None: for ever.
        order: "given", or "shuffled": the seed shuffles each cycle.
        change: "episode": changes wait for an episode's end; "now": they truncate it.
        task: Stay in this task for ever.
        repeat_action_probability: How likely a frame repeats the last frame's action.
        frame_skip: Frames of an env step; the last two are pooled.
        stack: Pictures of an observation.
        max_frames: Frames after which an episode is truncated.
        schedule_seed: Names the shuffles.
        render_mode: None or "rgb_array".

    Raises:
        ValueError: One line on what is wrong with an argument, or which extra to install.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": FRAMES_PER_SECOND // 4,
    }

    def __init__(
        self,
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
        schedule_seed: int = 0,
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
        from perennial.envs.atari import AtariLane, Emulators

        self._tour = Tour(args, schedule_seed)
        self._at_once = args["change"] == "now"
        self._lane = AtariLane(
            Emulators(),
            args["frame_skip"],
            args["repeat_action_probability"],
            args["max_frames"],
        )
        self.observation_space, self.action_space = make_spaces(args["stack"])
        self.render_mode = render_mode
        self._stack = np.zeros((args["stack"], SIDE, SIDE), np.uint8)
        self._task = self._tour.clock.task
        self._entry = self._tour.entry(self._task)

    @property
    def ale(self) -> Any:
        """The emulator that plays now; None before the first reset."""
        return self._lane.ale

    def _info(self) -> dict[str, Any]:
        entry = self._entry
        return {
            "task": self._task,
            "task_params": entry.params,
            "game": entry.game,
            "lives": self._lane.lives(),
            "frames": self._lane.frames,
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frames, dict[str, Any]]:
        """Start an episode in the clock's task; see the class for `seed` and `options`."""
        super().reset(seed=seed)
        if seed is not None:
            self._lane.seed(self.np_random)
        self._lane.rng = self.np_random
        clock = self._tour.clock
        if options and options.get("restart"):
            clock.restart()
        self._task = clock.episode_end()
        self._entry = self._tour.entry(self._task)
        self._stack[:] = 0
        self._lane.start(self._entry, self._stack[-1])
        return self._stack.copy(), self._info()

    def step(self, action: Any) -> tuple[Frames, float, bool, bool, dict[str, Any]]:
        """One env step."""
        if not self.action_space.contains(np.asarray(action)[()]):
            raise ValueError(f"an action is a whole number from 0 to {ACTIONS - 1}; got {action}")
        if self._lane.ale is None:
            raise gym.error.ResetNeeded("call reset before the first step")
        self._stack[:-1] = self._stack[1:]
        points, terminated, truncated = self._lane.step(int(action), self._stack[-1])
        clock = self._tour.clock
        if clock.advance(1) and self._at_once and not terminated:
            truncated = truncated or self._tour.entry(clock.task) != self._entry
        return self._stack.copy(), points, terminated, truncated, self._info()

    def render(self) -> Any:
        """The game's picture [210, 160, 3] uint8 with "rgb_array"."""
        return None if self.render_mode is None else self._lane.render()

    def get_state(self) -> dict[str, Any]:
        """Everything that `set_state` needs to go on bit for bit: numpy arrays and JSON values."""
        self._lane.rng = self.np_random
        return {
            "clock": self._tour.clock.get_state(),
            "task": self._task,
            "game": self._entry.game,
            "stack": self._stack.copy(),
            "lane": self._lane.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a `get_state`; no reset is needed. Replays the episode so far.

        Raises:
            ValueError: The state is of other games, another stack or another ale-py.
        """
        check_state(self._tour, [int(state["task"])], [state["game"]], self._stack, state["stack"])
        self._tour.clock.set_state(state["clock"])
        self._task = int(state["task"])
        self._entry = self._tour.entry(self._task)
        self._lane.set_state(self._entry, state["lane"])
        self._np_random = self._lane.rng
        self._stack[:] = state["stack"]


def check_state(tour: Tour, tasks: list[int], games: list[str], stack: Frames, saved: Any) -> None:
    """Refuse a state of other games or another shape of observations."""
    for task, game in zip(tasks, games, strict=True):
        if tour.entry(task).game != game:
            here = tour.entry(task).game
            raise ValueError(f"the saved state plays {game} in task {task}; here it is {here}")
    if np.shape(saved) != stack.shape:
        raise ValueError(f"the saved stack has shape {np.shape(saved)}, not {stack.shape}")
