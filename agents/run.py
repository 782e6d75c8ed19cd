"""A run: its folder, the processes that train its seeds, and the parent that watches over them.

The parent imports no torch: it owns the progress display, the signals and the lock of the run's
folder, and starts one worker per group of seeds. On CPU that is one single-threaded process per
core, each with its share of the seeds; on a GPU one process with all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from perennial.agents.config import Config, UsageError, from_json, to_json
from perennial.agents.lock import FolderLock
from perennial.agents.progress import Progress

_PACKAGES = ("perennial-rl", "torch", "numpy", "gymnasium", "mujoco", "stable-baselines3")


@dataclass(frozen=True)
class Run:
    """A run on disk: what `train` returns and `load` takes."""

    path: Path
    config: Config
    groups: tuple[tuple[int, ...], ...]
    threads: int
    device: str

    @property
    def seed_dirs(self) -> dict[int, Path]:
        """Folder of each seed."""
        return {seed: self.path / f"seed-{seed}" for seed in self.config.seeds}

    def check_task(self, task: int | None) -> None:
        """UsageError where `task` is given and the environment has none."""
        from perennial.envs.specs import ENVS

        if task is not None and self.config.env not in ENVS:
            raise UsageError(f"{self.config.env} has no tasks: leave --task out")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Read a run's config.json; UsageError when `path` is no run."""
        path = Path(path)
        try:
            record = json.loads((path / "config.json").read_text())
            placed = record["grouping"]
            groups = tuple(tuple(int(s) for s in group) for group in placed["groups"])
            return cls(
                path, from_json(record), groups, int(placed["threads"]), str(placed["device"])
            )
        except FileNotFoundError:
            raise UsageError(
                f"{path} is no run: it has no config.json{_runs_below(path)}"
            ) from None
        except (
            OSError,
            KeyError,
            TypeError,
            AttributeError,
            UnicodeDecodeError,
            json.JSONDecodeError,
        ) as e:
            reason = f"{type(e).__name__}: {e}".replace("\n", " ")
            raise UsageError(
                f"{path / 'config.json'} is not a run's configuration ({reason})"
            ) from None

    def write(self) -> None:
        """Write config.json: every option, the versions at work and how seeds are grouped."""
        record = {
            **to_json(self.config),
            "versions": versions(),
            "grouping": {"groups": self.groups, "threads": self.threads, "device": self.device},
        }
        temporary = self.path / ".config.json.tmp"
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(self.path / "config.json")


def train(config: Config, stream: TextIO | None = None) -> tuple[Run, int]:
    """Start a run in its own folder and see it through; returns the run and the exit status."""
    device = _device(config.device)
    groups, threads = grouping(config.seeds, device)
    run = Run(_new_folder(config), config, groups, threads, device)
    with _held(run.path):
        run.write()
        status = _supervise(run, stream or sys.stdout)
    if status == 2:  # nothing was trained: leave no folder that looks like a run
        shutil.rmtree(run.path, ignore_errors=True)
    return run, status


def resume(
    path: str | os.PathLike[str], steps: int | None = None, stream: TextIO | None = None
) -> int:
    """Go on with a run from its newest good checkpoints, to `steps` env steps per seed if given."""
    run = Run.open(path)
    _device(run.device)
    if steps is not None and steps != run.config.steps:
        config = dataclasses.replace(run.config, steps=steps)
        config.validate()
        run = dataclasses.replace(run, config=config)
    with _held(run.path):
        run.write()
        return _supervise(run, stream or sys.stdout)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(name: str) -> str:
    """`cpu` or `cuda`; UsageError when a GPU is asked for and there is none."""
    if name == "cpu" or (name == "auto" and not Path("/dev/nvidiactl").exists()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "auto":
        return "cpu"
    raise UsageError(
        "device=cuda, but torch finds no CUDA device: use --device cpu, or a CUDA build of torch"
    )


def grouping(seeds: tuple[int, ...], device: str) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Which seeds train together in one process, and the threads of each process."""
    available = cores()
    processes = 1 if device == "cuda" else min(available, len(seeds))
    share, extra = divmod(len(seeds), processes)
    groups, first = [], 0
    for k in range(processes):
        last = first + share + (k < extra)
        groups.append(seeds[first:last])
        first = last
    return tuple(groups), max(1, available // processes)


def _new_folder(config: Config) -> Path:
    """Make the run's folder; UsageError when it is in use, foreign or not writable."""
    try:
        if config.run_dir is None:
            return _timed_folder(Path("runs") / config.env.replace("/", "-") / _name(config))
        path = Path(config.run_dir)
        if path.is_file():
            raise UsageError(f"{path} is a file: choose another --run-dir")
        path.mkdir(parents=True, exist_ok=True)
        if (path / "config.json").exists():
            raise UsageError(
                f"{path} holds a run: `perennial resume {path}`, or choose another --run-dir"
            )
        if any(entry.name != ".lock" for entry in path.iterdir()):
            raise UsageError(
                f"{path} holds other files and no run: choose an empty or new --run-dir"
            )
        (path / ".lock").touch()
    except OSError as e:
        raise UsageError(
            f"cannot write {config.run_dir or 'runs/'} ({e.strerror}): choose another --run-dir"
        ) from None
    return path


def _name(config: Config) -> str:
    return "-".join((config.agent, *config.methods))


def _timed_folder(parent: Path) -> Path:
    """A folder named by the time; starts within the same second get a number."""
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        path = parent / (stamp if number == 1 else f"{stamp}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError  # the count has no end


def _runs_below(path: Path) -> str:
    """`; did you mean ...?` where a run lies up to three folders below."""
    for depth in ("*", "*/*", "*/*/*"):
        for found in path.glob(f"{depth}/config.json"):
            return f"; did you mean {found.parent}?"
    return ""


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    try:
        lock = FolderLock(path)
    except (ValueError, OSError) as e:
        raise UsageError(str(e)) from None
    try:
        yield
    finally:
        lock.release()


class Worker:
    """A child process with its group of seeds."""

    def __init__(
        self, run: Run, seeds: tuple[int, ...], inbox: queue.SimpleQueue[tuple[Worker, Any]]
    ):
        # One thread per matrix product, also in threads that torch does not know of.
        single = {
            name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        }
        self.seeds = seeds
        self.error: str | None = None
        self.seconds: dict[str, float] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "perennial.agents.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Two threads that wait by spinning take ten times as long where others work too.
            env={"OMP_WAIT_POLICY": "passive", **os.environ, **single},
        )
        self.tell(
            json.dumps(
                {
                    "config": to_json(run.config),
                    "run_dir": str(run.path),
                    "seeds": seeds,
                    "device": run.device,
                    "threads": run.threads,
                }
            )
        )
        threading.Thread(target=self._listen, args=(inbox,), daemon=True).start()

    def tell(self, line: str) -> None:
        """Send one line; a worker that is gone has no use for it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _listen(self, inbox: queue.SimpleQueue[tuple[Worker, Any]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            inbox.put((self, json.loads(line)))
        self.process.wait()
        inbox.put((self, None))


def _supervise(run: Run, stream: TextIO) -> int:
    """Start the workers, show their progress, forward a stop; the exit status of the command."""
    print(f"run folder: {run.path}", file=stream)
    print(f"tensorboard --logdir {run.path} --reload_interval 10", file=stream, flush=True)
    inbox: queue.SimpleQueue[tuple[Worker, Any]] = queue.SimpleQueue()
    stop = {"signal": 0}

    def on_signal(number: int, frame: Any) -> None:
        stop["signal"] = stop["signal"] or number

    in_main = threading.current_thread() is threading.main_thread()
    previous = (
        {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    )
    workers = [Worker(run, group, inbox) for group in run.groups]
    running, told, errors, usage = set(workers), False, [], False
    try:
        with Progress(run.config.steps, run.config.seeds, stream) as progress:
            while running:
                if stop["signal"] and not told:
                    told = True
                    progress.note("stopping: finishing the rollout and writing a checkpoint")
                    for worker in running:
                        worker.tell("stop")
                try:
                    worker, message = inbox.get(timeout=0.2)
                except queue.Empty:
                    continue
                if message is None:
                    running.discard(worker)
                    if worker.process.returncode and worker.error is None:
                        worker.error = f"its process ended with status {worker.process.returncode}"
                    if worker.error is not None:
                        errors.append((worker.seeds, worker.error))
                elif "error" in message:
                    worker.error, usage = message["error"], usage or message["usage"]
                elif "warning" in message:
                    progress.note(f"warning: {message['warning']}")
                elif "seconds" in message:
                    worker.seconds = message["seconds"]
                else:
                    progress.update(message)
    finally:
        for worker in running:
            worker.process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    for seeds, error in errors:
        names = ",".join(map(str, seeds))
        print(
            f"error: seeds {names}: {error}" if len(run.groups) > 1 else f"error: {error}",
            file=sys.stderr,
        )
    if errors:
        return 2 if usage else 1
    if stop["signal"]:
        print(f"stopped; `perennial resume {run.path}` goes on", file=stream)
        return 128 + stop["signal"]
    print(f"done; `perennial evaluate {run.path}` plays the trained agent", file=stream)
    return 0
