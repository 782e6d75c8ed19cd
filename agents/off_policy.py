"""What agents that learn from a replay do at every env step."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from perennial.agents.episodes import Episodes
from perennial.agents.replay import Replay


def step_into(
    replay: Replay,
    envs: gym.vector.VectorEnv,
    episodes: Episodes,
    asked: np.ndarray,
    actions: np.ndarray,
    latest: np.ndarray,
    bound: float | None,
) -> tuple[np.ndarray, list[int]]:
    """One step of every lane into the replay and the episodes.

    Args:
        asked: the actions as the environments take them, [S*E, ...].
        actions: the same as the replay keeps them, [S, E, *A].
        latest: the observations [S, E, *D] that they answer.
        bound: rewards are clipped to +- this in the replay; the episodes count them raw.

    Returns:
        The next observations, as `latest`, and the task of each seed.
    """
    lead = latest.shape[:2]
    obs, rewards, terminated, truncated, infos = envs.step(asked)
    raw = np.asarray(rewards, np.float64)[None]
    ended = terminated | truncated
    finals: dict[int, np.ndarray] = {}
    if "_final_obs" in infos:
        episodes.end(0, raw, ended, infos)
        finals = {
            int(lane): np.asarray(infos["final_obs"][lane], latest.dtype)
            for lane in np.flatnonzero(truncated & ~terminated)
        }
    episodes.rollout(raw)
    following = obs.reshape(latest.shape).astype(latest.dtype)
    tasks = [envs.task_of(c)[0] for c in range(lead[0])]  # type: ignore[attr-defined]
    learned = raw if bound is None else raw.clip(-bound, bound)
    replay.add(
        tasks,
        actions,
        learned.reshape(lead),
        terminated.reshape(lead),
        ended.reshape(lead),
        following,
        finals,
    )
    return following, tasks
