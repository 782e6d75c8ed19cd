"""Play what was trained: the policy of each seed, without noise, in one task that stays."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import gymnasium as gym
import numpy as np
import torch

from perennial.agents.checkpoint import newest_checkpoint
from perennial.agents.config import Config, UsageError
from perennial.agents.loop import AGENTS
from perennial.agents.run import Run
from perennial.agents.streams import environment_seeds
from perennial.agents.video import Video, check_video, draw_without_a_screen
from perennial.envs.specs import ENVS, task_names
from perennial.envs.vector import make_vec


class Policy:
    """The policy of one seed as trained: `act(observation)` gives the action without noise."""

    def __init__(self, run: Run, seed: int):
        """Read the newest good checkpoint of `seed`; UsageError when there is none."""
        if seed not in run.seed_dirs:
            known = ", ".join(map(str, run.config.seeds))
            raise UsageError(f"{run.path} has no seed {seed}: it has {known}")
        found = newest_checkpoint([run.seed_dirs[seed]], without="agent/replay")
        if found is None:
            raise UsageError(
                f"seed {seed} has no good checkpoint yet: `perennial resume {run.path}`"
            )
        config = run.config
        self.seed = seed
        self.env_steps, (tree,) = found
        envs = make_vec(config.env, 1, schedule_seeds=(seed,), **config.env_args)
        self._agent = AGENTS[config.agent](
            config,
            envs.single_observation_space,
            envs.single_action_space,
            (seed,),  # type: ignore[arg-type]
        )
        try:
            self._agent.load_state(0, tree["agent"])
            #: The task that training had reached.
            self.task: int = envs.task_in(0, tree["environments"])  # type: ignore[attr-defined]
        except (KeyError, ValueError, RuntimeError) as e:
            raise UsageError(f"{run.path} was written by another version ({e})") from e
        finally:
            envs.close()

    def asked(self, actions: np.ndarray) -> np.ndarray:
        """Actions of `act` as a vector environment takes them."""
        return self._agent.asked(actions)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Actions [..., A] for raw observations [..., D], normalised as in training."""
        return self._agent.act(observation)


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one seed in one task."""

    seed: int
    task: int
    returns: list[float]
    lengths: list[int]


def evaluate(
    run: Run, episodes: int = 10, task: int | None = None, video: str | None = None
) -> list[Evaluation]:
    """Play `episodes` whole episodes with each seed's policy.

    Args:
        run: a run with checkpoints.
        episodes: how many for each seed.
        task: which task of the seed's schedule; None: the one that training had reached.
        video: an mp4 file for the first episode of each seed, one after the other.

    Raises:
        UsageError: no good checkpoint, no such task, or nothing that could be filmed; one line.
    """
    run.check_task(task)
    file = None if video is None else check_video(video)
    film: Video | None = None
    results = []
    if file is not None:
        draw_without_a_screen()
    try:
        for seed in run.config.seeds:
            policy = Policy(run, seed)
            played = policy.task if task is None else task
            envs = _stage(run.config, seed, played, file is not None)
            if file is not None and film is None:
                film = Video(file, float(envs.metadata.get("render_fps", 30)))
            returns, lengths = _play(run.config, policy, envs, episodes, film)
            envs.close()
            results.append(Evaluation(seed, played, returns, lengths))
    except BaseException:
        if film is not None:
            film.drop()
        raise
    if film is not None:
        film.close()
    return results


def _stage(config: Config, seed: int, task: int, filmed: bool) -> gym.vector.VectorEnv:
    """One lane that stays in `task`, where the environment has any."""
    held = {"task": task} if config.env in ENVS else {}
    mode = "rgb_array" if filmed else None
    args = {**config.env_args, **held}
    try:
        return make_vec(config.env, 1, schedule_seeds=(seed,), render_mode=mode, **args)
    except ValueError as e:
        raise UsageError(str(e)) from e


def _play(
    config: Config,
    policy: Policy,
    envs: gym.vector.VectorEnv,
    episodes: int,
    film: Video | None,
) -> tuple[list[float], list[int]]:
    """Returns and lengths of whole episodes; the first one goes to `film`."""
    # Other episodes than those of training: the lane after the last one's seed.
    seeds = environment_seeds(policy.seed, config.num_envs + 1)[-1:]
    observations, _ = envs.reset(seed=seeds)  # type: ignore[arg-type]
    returns: list[float] = []
    lengths: list[int] = []
    total, length = 0.0, 0
    while len(returns) < episodes:
        if film is not None and not returns:
            film.add(_picture(config, envs))
        actions = policy.asked(policy.act(observations))
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        total, length = total + float(rewards[0]), length + 1
        if terminated[0] or truncated[0]:
            returns.append(total)
            lengths.append(length)
            total, length = 0.0, 0
    return returns, lengths


def _picture(config: Config, envs: gym.vector.VectorEnv) -> np.ndarray:
    try:
        pictures: Any = envs.render()
    except Exception as e:  # graphics drivers and optional packages fail in their own ways
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UsageError(f"--video: {config.env} cannot be drawn here ({reason})") from e
    if not pictures or np.ndim(pictures[0]) != 3:
        raise UsageError(f"--video: {config.env} draws no pictures")
    return np.asarray(pictures[0], np.uint8)


def main(
    path: str | os.PathLike[str],
    episodes: int,
    task: int | None,
    stream: TextIO,
    video: str | None = None,
) -> int:
    """`perennial evaluate`: a line per seed, the mean over seeds, and the video's name."""
    torch.set_num_threads(1)
    run = Run.open(Path(path))
    results = evaluate(run, episodes, task, video)
    for r in results:
        name = task_names(run.config.env, run.config.env_args, r.seed)
        where = f"task {r.task}" if name is None else f"task {r.task}, {name(r.task)}"
        print(
            f"seed {r.seed}: return {np.mean(r.returns):.1f} +- {np.std(r.returns):.1f} "
            f"(episodes {len(r.returns)}, mean length {np.mean(r.lengths):.0f}, {where})",
            file=stream,
        )
    if len(results) > 1:
        means = [float(np.mean(r.returns)) for r in results]
        print(f"mean over {len(results)} seeds: {np.mean(means):.1f}", file=stream)
    if video is not None:
        print(f"video: {video}", file=stream)
    return 0
