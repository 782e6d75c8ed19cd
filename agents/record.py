"""What one seed writes down: TensorBoard scalars, and one line per episode in episodes.csv.

    recorder = SeedRecorder(run_dir / "seed-0", config, resume_step=None)
    recorder.episode(env_steps=431, task=0, return_=12.5, length=431)
    if recorder.due(env_steps):
        recorder.scalars(env_steps, {"rollout/ep_rew_mean": 12.5, "task/index": 0})
    recorder.flush()  # before a checkpoint counts as written

How often: a run has at most 10,000 points per tag, and 2,000 of the plasticity metrics, whose tags
are many and long: an event file of 100M steps stays under 20 MB. `due` and `metrics_due` depend
on env_steps and the configuration alone, so a resumed run writes what the unbroken one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from perennial.agents import events
from perennial.agents.config import Config, to_json
from perennial.envs.specs import game_names

COLUMNS = "env_steps,task,return,length"
_POINTS = 10_000


class SeedRecorder:
    """The records of one seed.

    Args:
        seed_dir: `seed-<k>/` of the run's folder, which exists.
        config: the run's configuration.
        resume_step: None for a fresh run; else the env_steps of the checkpoint to go on from: what
            was recorded after them no longer counts (0: nothing that was recorded does).

    Raises:
        OSError: a file cannot be written; names the file.
    """

    def __init__(self, seed_dir: Path, config: Config, resume_step: int | None):
        self.seed_dir = Path(seed_dir)
        self._rollout = config.rollout
        self._every = math.ceil(max(1, config.steps / _POINTS / config.rollout)) * config.rollout
        self._metrics_every = config.metrics_interval
        # A point at the checkpoint's own step was written before it, hence + 1; from 0 all is new.
        purge_step = None if resume_step is None else resume_step + 1 if resume_step else 0
        self._events = events.EventFile(self.seed_dir, purge_step)
        if not resume_step:
            seed = int(self.seed_dir.name.rpartition("-")[2])
            for summary in events.hparams(hparams_of(config, seed)):
                self._events.write(0, summary)
            games = game_names(config.env, config.env_args)
            self._events.write(0, events.continual_page(games))
            self._events.write(0, events.config_text(to_json(config)))
        self._csv_path = self.seed_dir / "episodes.csv"
        if resume_step is None:
            self._csv_path.write_text(COLUMNS + "\n")
        else:
            cut_episodes(self._csv_path, resume_step)
        self._csv = open(self._csv_path, "a")

    def due(self, env_steps: int) -> bool:
        """Whether the rollout that ends at `env_steps` is one whose scalars are written."""
        return _crosses(env_steps, self._rollout, self._every)

    def metrics_due(self, env_steps: int) -> bool:
        """Whether plasticity is measured after the rollout that ends at `env_steps`."""
        return _crosses(env_steps, self._rollout, self._metrics_every)

    def scalars(self, env_steps: int, values: Mapping[str, float]) -> None:
        """Write {tag: value} at `env_steps` in one event; nothing for an empty mapping."""
        if values:
            self._events.write(env_steps, events.scalars(values))
            with _naming(self._csv_path):
                self._csv.flush()  # whoever looks at the curves finds their episodes

    def episode(self, env_steps: int, task: int, return_: float, length: int) -> None:
        """Add a finished episode: env_steps of the seed at its end, undiscounted return, length."""
        with _naming(self._csv_path):
            self._csv.write(f"{env_steps},{task},{float(return_)!r},{length}\n")

    def flush(self) -> None:
        """Put everything recorded so far on the disk."""
        with _naming(self._csv_path):
            self._csv.flush()
            os.fsync(self._csv.fileno())
        with _naming(self._events.path):
            self._events.sync()

    def close(self) -> None:
        """Flush and close the files; closing twice is fine."""
        if not self._csv.closed:
            self.flush()
            self._csv.close()
            self._events.close()


def cut_episodes(path: Path, env_steps: int) -> None:
    """Drop rows after `env_steps` and a torn last one; the old file stays until the new is done."""
    kept = [COLUMNS]
    if path.exists():
        with open(path) as lines:
            next(lines, None)
            for line in lines:
                cells = line.rstrip("\n").split(",")
                whole = line.endswith("\n") and len(cells) == 4 and cells[0].isdigit()
                if whole and int(cells[0]) <= env_steps:
                    kept.append(line.rstrip("\n"))
    fresh = path.with_suffix(".csv.tmp")
    with open(fresh, "w") as file:
        file.write("\n".join(kept) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def hparams_of(config: Config, seed: int) -> dict[str, float | str]:
    """The options as TensorBoard's hparams table takes them: at most 30, flat, each of one type.

    An option that can be off is text ("none"), so that its column has one type over all runs.
    """
    shown: dict[str, float | str] = {"agent": config.agent, "seed": seed}
    for field in dataclasses.fields(config):
        if field.metadata["hparam"]:
            value = getattr(config, field.name)
            plain = type(value) in (int, float) and field.type in ("int", "float")
            shown[field.name] = value if plain else field.metadata["kind"].spell(value)
    return shown


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk says which file it refused; errors of open files do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _crosses(env_steps: int, rollout: int, every: int) -> bool:
    return env_steps // every > (env_steps - rollout) // every
