"""The MuJoCo ant's physics, observation and reward for many lanes at once, without a task.

Numbers equal Gymnasium's Ant-v5 bit for bit (frame skip 5, reset noise 0.1), so results compare.
"""

import copy
import os
from functools import cache
from math import isfinite
from typing import Any

import gymnasium
import mujoco
import numpy as np
from mujoco import mj_rnePostConstraint, mj_step
from numpy.typing import NDArray

from perennial.envs.threads import JobThreads

FRAME_SKIP = 5
TIME_STEP = 0.01 * FRAME_SKIP  # seconds per env step
ACTION_SIZE = 8
STATE_SIZE = 13 + 14  # qpos without x and y, qvel
FORCE_SIZE = 14 * 6  # contact force and torque on each body; the first six are the world's: zero
OBSERVATION_SIZES = {
    "v5": STATE_SIZE + FORCE_SIZE - 6,
    "v4": STATE_SIZE,
    "v3": STATE_SIZE + FORCE_SIZE,
}
RESET_NOISE = 0.1
CONTROL_COST, CONTACT_COST, ALIVE = 0.5, 5e-4, 1.0
LOWEST_Z, HIGHEST_Z = 0.2, 1.0  # metres: beyond, the ant has fallen or flown

Floats = NDArray[np.float64]
# As arrays: numpy takes 0.2 us longer over a Python number.
_LOWEST, _HIGHEST = np.array(-1.0), np.array(1.0)  # of contact forces
_INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION)


@cache
def _compiled() -> mujoco.MjModel:
    folder = os.path.join(os.path.dirname(gymnasium.__file__), "envs", "mujoco", "assets")
    return mujoco.MjModel.from_xml_path(os.path.join(folder, "ant.xml"))


class AntLanes:
    """`num` ants, each with its own model (frictions differ) and data.

    Args:
        num: How many lanes, N.
        observation: "v5": 105 numbers, "v4": 27, "v3": 111 of which the last 84 are zero.
        contact_cost: Whether the reward charges contact forces.
        threads: Threads that step the lanes; more than 1 pays from two lanes on.
    """

    def __init__(self, num: int, observation: str, contact_cost: bool, threads: int = 1) -> None:
        self.num = num
        self.models = [copy.copy(_compiled()) for _ in range(num)]
        self.datas = [mujoco.MjData(model) for model in self.models]
        self.observation_size = OBSERVATION_SIZES[observation]
        self._observation = observation
        self._contact_cost = contact_cost
        self._needs_forces = contact_cost or observation == "v5"
        self._threads = JobThreads(min(threads, num)) if min(threads, num) > 1 else None
        self._init_qpos = self.datas[0].qpos.copy()
        self._init_qvel = self.datas[0].qvel.copy()
        # Live views into each lane's data: attribute access on MjData costs more than the copies.
        self._views = [
            (model, data, data.ctrl, data.qpos[2:], data.qvel, data.xpos[1, :2],
             data.cfrc_ext.reshape(-1))
            for model, data in zip(self.models, self.datas, strict=True)
        ]  # fmt: skip
        self._frictions = [model.geom_friction[:, 0] for model in self.models]
        self._forces = np.zeros((num, FORCE_SIZE))
        self._actions: NDArray[Any] = np.zeros((num, ACTION_SIZE))
        self._obs = np.zeros((num, self.observation_size))
        self._squares = [0.0] * num  # of the state: finite exactly where the state is
        # The torso's x and y where the last step's velocity ended, and before that: the engine's
        # body positions are those of the last substep's beginning, and Ant-v5 takes them so.
        self.torso = [[0.0, 0.0] for _ in range(num)]
        self.torso_before = [[0.0, 0.0] for _ in range(num)]
        # Sums of squares of the last step, which the reward's two costs scale.
        self.action_squares = [0.0] * num
        self.contact_squares = [0.0] * num  # stays zero where contacts cost nothing

    def set_friction(self, lane: int, friction: float) -> None:
        """Sliding friction of every geom: MuJoCo takes the larger of a pair, so all must move."""
        self._frictions[lane][:] = friction

    def reset(self, lane: int, rng: np.random.Generator) -> Floats:
        """Start an episode in one lane; its observation [D]. Draws as Ant-v5's reset does."""
        model, data = self.models[lane], self.datas[lane]
        mujoco.mj_resetData(model, data)
        data.qpos[:] = self._init_qpos + rng.uniform(-RESET_NOISE, RESET_NOISE, model.nq)
        data.qvel[:] = self._init_qvel + RESET_NOISE * rng.standard_normal(model.nv)
        mujoco.mj_forward(model, data)
        _, _, _, pose, velocity, torso, forces = self._views[lane]
        self.torso[lane] = torso.tolist()
        row = np.zeros(self.observation_size)
        row[:13] = pose
        row[13:STATE_SIZE] = velocity
        if self._observation == "v5":
            row[STATE_SIZE:] = np.clip(forces[6:], _LOWEST, _HIGHEST)
        return row

    def step(self, actions: NDArray[Any]) -> tuple[Floats, list[float], list[bool]]:
        """One env step of every lane.

        Args:
            actions: [N, 8]; never clipped here: the engine clamps the motors, while the control
                cost sees what the agent asked for.

        Returns:
            Observations [N, D] (a new array), N rewards, N flags: terminated.
        """
        num = self.num
        self._actions = actions
        self._obs = obs = np.zeros((num, self.observation_size))
        self.torso_before = self.torso[:]
        if self._threads is None:
            for lane in range(num):
                self._simulate(lane, FRAME_SKIP)
        else:
            self._threads.run(self._simulate_part, range(num))

        # What is long goes through numpy for all lanes at once; the few numbers per lane are
        # quicker in plain Python than in a dozen numpy calls on short arrays.
        if self._needs_forces:
            forces = self._forces
            np.maximum(forces, _LOWEST, out=forces)
            np.minimum(forces, _HIGHEST, out=forces)
            if self._observation == "v5":
                obs[:, STATE_SIZE:] = forces[:, 6:]
            if self._contact_cost:
                np.square(forces, out=forces)
                self.contact_squares = np.add.reduce(forces, 1).tolist()
        self.action_squares = np.add.reduce(np.square(actions), 1).tolist()
        torso, torso_before = self.torso, self.torso_before
        actions_cost, contacts_cost = self.action_squares, self.contact_squares
        rewards, terminated = [], []
        for lane in range(num):
            healthy = LOWEST_Z <= obs.item(lane, 0) <= HIGHEST_Z and isfinite(self._squares[lane])
            costs = CONTROL_COST * actions_cost[lane] + CONTACT_COST * contacts_cost[lane]
            velocity = (torso[lane][0] - torso_before[lane][0]) / TIME_STEP
            rewards.append(velocity + (ALIVE if healthy else 0.0) - costs)
            terminated.append(not healthy)
        return obs, rewards, terminated

    def _simulate_part(self, job: int) -> int | None:
        """The first substeps of lane `job`, or the last one of lane `job - num`."""
        if job >= self.num:
            self._simulate(job - self.num, 1)
            return None
        model, data, ctrl = self._views[job][:3]
        ctrl[:] = self._actions[job]
        mj_step(model, data, FRAME_SKIP - 1)
        return job + self.num

    def _simulate(self, lane: int, substeps: int) -> None:
        model, data, ctrl, pose, velocity, torso, forces = self._views[lane]
        ctrl[:] = self._actions[lane]
        mj_step(model, data, substeps)
        if self._needs_forces:
            # The engine computes external forces only on demand.
            mj_rnePostConstraint(model, data)
            self._forces[lane] = forces
        row = self._obs[lane]
        row[:13] = pose
        row[13:STATE_SIZE] = velocity
        state = row[:STATE_SIZE]
        self._squares[lane] = state.dot(state)
        self.torso[lane] = torso.tolist()

    def get_state(self, lane: int) -> dict[str, Any]:
        """One lane's physics, but for its friction: `set_state` goes on bit for bit."""
        model, data = self.models[lane], self.datas[lane]
        physics = np.empty(mujoco.mj_stateSize(model, _INTEGRATION))
        mujoco.mj_getState(model, data, physics, _INTEGRATION)
        # The reward's velocity starts at the torso's place as the last step left it, which the
        # engine's own state does not hold.
        return {"physics": physics, "torso": list(self.torso[lane])}

    def set_state(self, lane: int, state: dict[str, Any]) -> None:
        """Go on from a `get_state`; ValueError where it is of another model."""
        model, data = self.models[lane], self.datas[lane]
        physics = np.ascontiguousarray(state["physics"], dtype=np.float64)
        size = mujoco.mj_stateSize(model, _INTEGRATION)
        if physics.shape != (size,):
            raise ValueError(f"ant state has {physics.size} numbers, this MuJoCo's has {size}")
        mujoco.mj_setState(model, data, physics, _INTEGRATION)
        mujoco.mj_forward(model, data)  # for whoever looks at or renders the data
        mujoco.mj_setState(model, data, physics, _INTEGRATION)  # should it move the warm start
        self.torso[lane] = list(state["torso"])

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.close()
            self._threads = None
