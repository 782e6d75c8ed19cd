"""The training loop of one process: a group of seeds, new or from their checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from perennial.agents.checkpoint import newest_checkpoint, write_checkpoint
from perennial.agents.config import Config, UsageError
from perennial.agents.dqn import DQN
from perennial.agents.episodes import Episodes
from perennial.agents.ppo import PPO
from perennial.agents.record import SeedRecorder
from perennial.agents.sac import SAC
from perennial.agents.streams import environment_seeds
from perennial.envs.specs import ENVS, task_names
from perennial.envs.vector import make_vec

Report = Callable[[dict[str, Any]], None]
AGENTS: dict[str, Any] = {"ppo": PPO, "sac": SAC, "dqn": DQN}


class TrainingError(RuntimeError):
    """Training cannot go on; one line that says what went wrong, where and what is kept."""


def train_group(
    config: Config,
    seeds: tuple[int, ...],
    run_dir: Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    report: Report = lambda message: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Train `seeds` in step until `config.steps` env steps each, or until `stopping()`.

    Goes on from the newest checkpoint that all the seeds have. Returns the seconds spent in each
    part.
    """
    try:
        group = Group(config, seeds, run_dir, device, threads, report)
    except ValueError as e:  # an option that only the environment or the network could judge
        raise UsageError(str(e)) from e
    agent, envs, episodes, clock = group.agent, group.envs, group.episodes, group.clock
    begun, begun_steps = time.monotonic(), episodes.env_steps
    try:
        while episodes.env_steps < config.steps and not stopping():
            before = episodes.env_steps
            losses = agent.advance(envs, episodes, clock, stopping)
            if episodes.env_steps % config.rollout or episodes.env_steps == before:
                break  # stopped between two points of the log
            group.check(losses)
            group.tell_changes()
            with clock("metrics"):
                correlates = group.measure()
            with clock("record"):
                fps = (episodes.env_steps - begun_steps) / (time.monotonic() - begun)
                group.record(losses, correlates, fps)
            if group.passes(config.checkpoint_interval) or episodes.env_steps >= config.steps:
                with clock("checkpoint"):
                    group.save()
        group.save()
    finally:
        group.close()
    return group.seconds


class Group:
    """What the loop works on: environments, agent, episodes, recorders and their state on disk."""

    def __init__(
        self,
        config: Config,
        seeds: tuple[int, ...],
        run_dir: Path,
        device: str,
        threads: int,
        report: Report,
    ):
        self.config, self.seeds, self.report = config, seeds, report
        self.seconds: dict[str, float] = {}
        self.seed_dirs = [run_dir / f"seed-{s}" for s in seeds]
        self.envs = make_vec(
            config.env,
            len(seeds) * config.num_envs,
            schedule_seeds=seeds,
            threads=threads,
            **config.env_args,
        )
        self.agent = AGENTS[config.agent](
            config,
            self.envs.single_observation_space,
            self.envs.single_action_space,
            seeds,
            device,
            threads,  # type: ignore[arg-type]
        )
        self.episodes = Episodes(len(seeds), config.num_envs)
        found = newest_checkpoint(self.seed_dirs, warn=lambda text: report({"warning": text}))
        self.saved = found[0] if found else 0
        self.tasks = [0] * len(seeds)
        self.changed: list[int | None] = [None] * len(seeds)  # env_steps at the latest change
        self.names = [task_names(config.env, config.env_args, seed) for seed in seeds]
        observations, _ = self.envs.reset(
            seed=[x for s in seeds for x in environment_seeds(s, config.num_envs)]  # type: ignore[arg-type]
        )
        self.agent.start(observations)
        for copy, tree in enumerate(found[1] if found else []):
            self.agent.load_state(copy, tree["agent"])
            self.episodes.load_state(copy, tree["episodes"])
            self.tasks[copy], self.changed[copy] = tree["task"], tree.get("changed")
            fresh = self.envs.set_state(copy, tree["environments"])  # type: ignore[attr-defined]
            if fresh is not None:
                self.agent.restart(copy, fresh)
                self.episodes.abandon(copy)
                report({"warning": f"{config.env} cannot go on exactly: a new episode begins"})
        self.recorders = [
            # An earlier attempt without a checkpoint starts again from step 0, over what it wrote.
            SeedRecorder(d, config, self.saved if (d / "episodes.csv").exists() else None)
            for d in self.seed_dirs
        ]

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the time of the block to `seconds[part]`."""
        begun = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begun

    def passes(self, interval: int) -> bool:
        """Whether the last rollout passed a multiple of `interval`.

        A function of env_steps alone, so that a resumed run acts at the same steps.
        """
        steps = self.episodes.env_steps
        return steps // interval > (steps - self.config.rollout) // interval

    def tell_changes(self) -> None:
        """Tell the agent which seeds' schedule has come to another task since the last point."""
        tasks = [self.envs.task_of(c)[0] for c in range(len(self.seeds))]  # type: ignore[attr-defined]
        changed = [now != before for now, before in zip(tasks, self.tasks, strict=True)]
        if any(changed):
            self.agent.on_change(changed)
        for copy in np.flatnonzero(changed).tolist():
            self.changed[copy] = self.episodes.env_steps
        self.tasks = tasks

    def check(self, losses: dict[str, np.ndarray]) -> None:
        """Stop at the first loss that is not finite: the last checkpoint stays good."""
        for name, values in losses.items():
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size and name != "explained_variance":
                task, _ = self.envs.task_of(int(bad[0]))  # type: ignore[attr-defined]
                raise TrainingError(
                    f"seed {self.seeds[bad[0]]}: train/{name} is {values[bad[0]]} at env step "
                    f"{self.episodes.env_steps} (task {task}); checkpoints before it are kept"
                )

    def measure(self) -> dict[str, np.ndarray]:
        """Correlates of plasticity [S] on the last rollout's observations, when due, by tag."""
        if not self.recorders[0].metrics_due(self.episodes.env_steps):
            return {}
        measured = self.agent.measure()
        values = {
            f"plasticity/{key}": np.asarray(value, np.float64) for key, value in measured.items()
        }
        for name, count in self.agent.counts().items():
            values[f"intervention/{name}/units_reset"] = count.cpu().double().numpy()
        return values

    def record(
        self, losses: dict[str, np.ndarray], correlates: dict[str, np.ndarray], fps: float
    ) -> None:
        """Write every seed's scalars and episodes, and tell the parent process."""
        steps = self.episodes.env_steps
        self._write_episodes()
        for copy, (seed, recorder) in enumerate(zip(self.seeds, self.recorders, strict=True)):
            averages, names = self.episodes.averages(copy), self.names[copy]
            measured = {tag: float(values[copy]) for tag, values in correlates.items()}
            if recorder.due(steps):
                measured |= averages | self._task_scalars(copy) | {"time/fps": fps}
                measured |= {
                    f"train/{name}": float(values[copy]) for name, values in losses.items()
                }
            recorder.scalars(steps, measured)
            self.report(
                {
                    "seed": seed,
                    "env_steps": steps,
                    "task": self.tasks[copy],
                    "name": None if names is None else names(self.tasks[copy]),
                    "fps": fps,
                    "return": averages.get("rollout/ep_rew_mean"),
                }
            )

    def _task_scalars(self, copy: int) -> dict[str, float]:
        """Where the seed's schedule is, a mark where it changed, and how its latest game goes.

        TensorBoard has no marks of its own: `task/change` is 0, and for half a percent of the run
        it goes to the highest return so far and to the lowest, a line across any chart of returns.
        """
        task, parameters = self.envs.task_of(copy)  # type: ignore[attr-defined]
        values = {"task/index": task} | {f"task/{name}": v for name, v in parameters.items()}
        latest, name = self.episodes.latest(copy), self.names[copy]
        if self.config.env in ENVS:
            since, wide = self.changed[copy], self.config.steps / 200
            passed = math.inf if since is None else self.episodes.env_steps - since
            far, near = sorted(self.episodes.extremes[copy], key=abs, reverse=True)
            mark = (near or far or 1.0) if passed > wide / 2 else (far or 1.0)
            values["task/change"] = mark if passed <= wide else 0.0
        if name is not None and latest is not None:
            values[f"game/{name(latest[0])}/return"] = latest[1]
        return values

    def _write_episodes(self) -> None:
        for copy, recorder in enumerate(self.recorders):
            for episode in self.episodes.take(copy):
                recorder.episode(*episode)

    def save(self) -> None:
        """Write a checkpoint of every seed, unless this step has one."""
        steps = self.episodes.env_steps
        if steps == self.saved:
            return
        self._write_episodes()
        for copy, (seed_dir, recorder) in enumerate(
            zip(self.seed_dirs, self.recorders, strict=True)
        ):
            recorder.flush()  # what the checkpoint has seen is on disk before the checkpoint is
            write_checkpoint(
                seed_dir,
                steps,
                {
                    "agent": self.agent.state(copy),
                    "task": self.tasks[copy],
                    "changed": self.changed[copy],
                    "episodes": self.episodes.state(copy),
                    "environments": self.envs.get_state(copy),  # type: ignore[attr-defined]
                },
            )
        self.saved = steps

    def close(self) -> None:
        """Release files and simulators."""
        for recorder in self.recorders:
            recorder.close()
        self.envs.close()
