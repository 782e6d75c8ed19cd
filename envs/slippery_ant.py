"""An ant on ground whose friction changes: the problem of Dohare et al., Nature 632 (2024).

At friction 1 it is Gymnasium's Ant-v5, bit for bit. A change sets the sliding friction of every
geom, as the published code does in the XML; no environment is rebuilt. Deviations from that code:
the schedule is a function of the seed, not a stored table (the same law: log-uniform on [0.02, 2]);
terminal steps do not pay Ant-v3's survival bonus (Ant-v5's fix).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from perennial.envs.ant import (
    ACTION_SIZE,
    ALIVE,
    CONTACT_COST,
    CONTROL_COST,
    TIME_STEP,
    AntLanes,
    Floats,
)
from perennial.envs.schedules import Clock, Schedule, make_values
from perennial.envs.specs import check_args
from perennial.envs.state import generator_from_state

ENV_ID = "perennial/SlipperyAnt-v0"
RENDER_FPS = round(1.0 / TIME_STEP)
FRAME_SIZE = 480  # pixels, both ways


def make_clock(args: dict[str, Any], schedule_seed: int) -> Clock:
    if not isinstance(schedule_seed, int | np.integer) or schedule_seed < 0:
        raise ValueError(f"schedule_seed must be a whole number of at least 0; got {schedule_seed}")
    values = make_values(args["schedule"], args["friction"], args["frictions"], args["period"])
    schedule = Schedule(values, args["change_every"], int(schedule_seed))
    return Clock(schedule, args["reference"], args["task"])


def make_lanes(args: dict[str, Any], num: int, threads: int = 1) -> AntLanes:
    contact_cost = args["contact_cost"]
    if contact_cost is None:
        contact_cost = args["observation"] != "v3"
    return AntLanes(num, args["observation"], contact_cost, threads)


def make_spaces(lanes: AntLanes) -> tuple[Any, Any]:
    observation = gym.spaces.Box(-np.inf, np.inf, (lanes.observation_size,), np.float64)
    return observation, gym.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)


def make_renderer(lanes: AntLanes, lane: int) -> Any:
    from gymnasium.envs.mujoco.ant_v5 import DEFAULT_CAMERA_CONFIG
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    model, data = lanes.models[lane], lanes.datas[lane]
    return MujocoRenderer(model, data, DEFAULT_CAMERA_CONFIG, FRAME_SIZE, FRAME_SIZE)


def check_render_mode(render_mode: str | None, modes: Sequence[str]) -> None:
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"render_mode={render_mode}: choose from {', '.join(modes)}, or none")


class SlipperyAntEnv(gym.Env[Floats, NDArray[np.float32]]):
    """One slippery ant (`gym.make("perennial/SlipperyAnt-v0", ...)`).

    Actions: 8 motor torques in [-1, 1], never clipped before the control cost. Observations: see
    `observation`. Reward: forward velocity (m/s) + 1 while healthy - 0.5 |action|^2 - 5e-4 |contact
    forces, clipped to 1|^2. `info["task"]` and `info["task_params"]["friction"]` name the task.

    `reset(seed=...)` reseeds the physics only and the clock goes on; `options={"restart": True}`
    starts the clock again.

    Args:
        change_every: Env steps from one change to the next.
        friction: Range of the friction's draws or swings; a linear drift goes from first to last.
        frictions: The values of schedule="list" and "cycle".
        schedule: "log-uniform", "list", "cycle", "linear" or "sinusoidal".
        schedule_seed: Names the schedule: the same number, the same changes.
        period: Env steps of a drift. Drifts move in steps of `change_every`.
        change: "episode": changes wait for an episode's end; "now": they come at once.
        reference: "nature": count from the last change, at episode ends, strictly more than.
        task: Stay in this task for ever.
        observation: "v5" (105 numbers, contact forces), "v4" (27) or "v3" (the published 111).
        contact_cost: Charge contact forces; None: yes, but not with "v3", as published.
        render_mode: None, "rgb_array" or "human".

    Raises:
        ValueError: One line on what is wrong with an argument.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["human", "rgb_array"],
        "render_fps": RENDER_FPS,
    }

    def __init__(
        self,
        change_every: int = 2_000_000,
        friction: tuple[float, float] = (0.02, 2.0),
        frictions: Sequence[float] | None = None,
        schedule: str = "log-uniform",
        schedule_seed: int = 0,
        period: int | None = None,
        change: str = "episode",
        reference: str | None = None,
        task: int | None = None,
        observation: str = "v5",
        contact_cost: bool | None = None,
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
            },
        )
        check_render_mode(render_mode, self.metadata["render_modes"])
        self._clock = make_clock(args, schedule_seed)
        self._at_once = args["change"] == "now"
        self._lanes = make_lanes(args, 1)
        self.observation_space, self.action_space = make_spaces(self._lanes)
        self.render_mode = render_mode
        self._mujoco_renderer: Any = None
        self._enter(self._clock.task)

    @property
    def model(self) -> Any:
        """The MuJoCo model."""
        return self._lanes.models[0]

    @property
    def data(self) -> Any:
        """The MuJoCo data."""
        return self._lanes.datas[0]

    def _enter(self, task: int) -> None:
        self._task = task
        self._friction = self._clock.schedule.value(task)
        self._lanes.set_friction(0, self._friction)

    def _info(self) -> dict[str, Any]:
        position = self.data.qpos[:2]
        return {
            "task": self._task,
            "task_params": {"friction": self._friction},
            "x_position": float(position[0]),
            "y_position": float(position[1]),
            "distance_from_origin": float(np.linalg.norm(position)),
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Any]]:
        """Start an episode in the clock's task; see the class for `seed` and `options`."""
        super().reset(seed=seed)
        if options and options.get("restart"):
            self._clock.restart()
        self._enter(self._clock.episode_end())
        obs = self._lanes.reset(0, self.np_random)
        if self.render_mode == "human":
            self.render()
        return obs, self._info()

    def step(self, action: NDArray[np.float32]) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """One env step of 0.05 s. `info` names the task that is in force from now on."""
        actions = np.asarray(action)
        if actions.shape != (ACTION_SIZE,):
            raise ValueError(f"an action has shape ({ACTION_SIZE},); got {actions.shape}")
        lanes = self._lanes
        obs, (reward,), (terminated,) = lanes.step(actions[None])
        if self._clock.advance(1) and self._at_once:
            self._enter(self._clock.task)
        if self.render_mode == "human":
            self.render()
        (x, y), (x_before, y_before) = lanes.torso[0], lanes.torso_before[0]
        info = {
            **self._info(),
            "x_velocity": (x - x_before) / TIME_STEP,
            "y_velocity": (y - y_before) / TIME_STEP,
            "reward_forward": (x - x_before) / TIME_STEP,
            "reward_ctrl": -CONTROL_COST * lanes.action_squares[0],
            "reward_contact": -CONTACT_COST * lanes.contact_squares[0],
            "reward_survive": 0.0 if terminated else ALIVE,
        }
        return obs[0], reward, terminated, False, info

    def render(self) -> Any:
        """A frame [480, 480, 3] uint8 with "rgb_array"; shows a window with "human"."""
        if self.render_mode is None:
            return None
        if self._mujoco_renderer is None:
            self._mujoco_renderer = make_renderer(self._lanes, 0)
        return self._mujoco_renderer.render(self.render_mode)

    def close(self) -> None:
        """Close the renderer, if there is one."""
        if self._mujoco_renderer is not None:
            self._mujoco_renderer.close()
            self._mujoco_renderer = None

    def get_state(self) -> dict[str, Any]:
        """Everything that `set_state` needs to go on bit for bit: numpy arrays and JSON values.

        A time limit around this environment keeps its own count.
        """
        return {
            "clock": self._clock.get_state(),
            "task": self._task,
            "lane": self._lanes.get_state(0),
            "rng": self.np_random.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a `get_state`; no reset is needed."""
        self._clock.set_state(state["clock"])
        self._enter(int(state["task"]))
        self._lanes.set_state(0, state["lane"])
        self._np_random = generator_from_state(state["rng"])
