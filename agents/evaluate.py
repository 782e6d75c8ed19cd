"""Play what was trained: the policy of each seed, without noise, in one task that stays."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from perennial.agents.checkpoint import newest_checkpoint
from perennial.agents.config import UsageError
from perennial.agents.loop import AGENTS
from perennial.agents.run import Run
from perennial.agents.streams import environment_seeds
from perennial.envs.vector import make_vec


class Policy:
    """The policy of one seed as trained: `act(observation)` gives the action without noise."""

    def __init__(self, run: Run, seed: int):
        """Read the newest good checkpoint of `seed`; UsageError when there is none."""
        if seed not in run.seed_dirs:
            known = ", ".join(map(str, run.config.seeds))
            raise UsageError(f"{run.path} has no seed {seed}: it has {known}")
        found = newest_checkpoint([run.seed_dirs[seed]])
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


def evaluate(run: Run, episodes: int = 10, task: int | None = None) -> list[Evaluation]:
    """Play `episodes` whole episodes with each seed's policy.

    Args:
        run: a run with checkpoints.
        episodes: how many for each seed.
        task: which task of the seed's schedule; None: the one that training had reached.
    """
    from perennial.envs.specs import ENVS

    config, results = run.config, []
    changes = config.env in ENVS
    run.check_task(task)
    for seed in config.seeds:
        policy = Policy(run, seed)
        played = policy.task if task is None else task
        held = {"task": played} if changes else {}
        envs = make_vec(config.env, 1, schedule_seeds=(seed,), **{**config.env_args, **held})
        # Other episodes than those of training: the lane after the last one's seed.
        observations, _ = envs.reset(seed=environment_seeds(seed, config.num_envs + 1)[-1:])  # type: ignore[arg-type]
        returns: list[float] = []
        lengths: list[int] = []
        total, length = 0.0, 0
        while len(returns) < episodes:
            actions = policy.asked(policy.act(observations))
            observations, rewards, terminated, truncated, _ = envs.step(actions)
            total, length = total + float(rewards[0]), length + 1
            if terminated[0] or truncated[0]:
                returns.append(total)
                lengths.append(length)
                total, length = 0.0, 0
        envs.close()
        results.append(Evaluation(seed, played, returns, lengths))
    return results


def main(path: str | os.PathLike[str], episodes: int, task: int | None, stream: TextIO) -> int:
    """`perennial evaluate`: a line per seed, and the mean over seeds."""
    from perennial.envs.specs import task_names

    torch.set_num_threads(1)
    run = Run.open(Path(path))
    results = evaluate(run, episodes, task)
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
    return 0
