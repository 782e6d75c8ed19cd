"""Figures taken side by side: peers and ours by turns, in fresh processes, in one run.

Machines are shared and noisy, so what counts are ratios taken in one run, with the same
hyper-parameters and logging on; the median of the rounds is shown.
"""

from __future__ import annotations

import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from perennial.agents.config import build_config
from perennial.agents.run import Run, Worker, grouping

ROUNDS = 3


@dataclass
class Table:
    """Measured rows: name -> one figure per round."""

    rows: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Add one round's figure."""
        self.rows.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """Median over the rounds."""
        return statistics.median(self.rows[name])

    def ratio(self, above: str, below: str) -> float:
        """Median over the rounds of the ratio taken within each round."""
        return statistics.median(
            a / b for a, b in zip(self.rows[above], self.rows[below], strict=True)
        )

    def show(self, stream: TextIO, unit: str, ratios: Mapping[str, float]) -> dict[str, Any]:
        """Print medians, in `unit`, and ratios; all of it as a record."""
        width = max(map(len, [*self.rows, *ratios]))
        print(f"\n{unit} (median of rounds)", file=stream)
        for name in self.rows:
            median = self.median(name)
            print(f"  {name:{width}s} {median:8.{0 if median >= 100 else 1}f}", file=stream)
        print("\nratios (median of the rounds' ratios)", file=stream)
        for name, value in ratios.items():
            print(f"  {name:{width}s} {value:8.3f}", file=stream)
        key = unit.replace("/s", " per second").replace(" ", "_")
        return {key: self.rows, "ratios": dict(ratios)}


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def peer(script: str, *words: Any, processes: int = 1, threads: int = 1) -> float:
    """The figure that `script` prints last, summed over processes that run side by side.

    The script finds `words` in sys.argv; each process has `threads` threads.
    """
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(threads),
        )
        for _ in range(processes)
    ]
    total = 0.0
    for process in running:
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a peer's run failed: {err.strip().splitlines()[-1]}")
        total += float(out.strip().splitlines()[-1])
    return total


def ours(agent: str, given: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """Env steps per second over all seeds after the first report, and seconds by part of the loop.

    On the CPU and without checkpoints before the end: peers write none either.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = {"run_dir": folder, "checkpoint_every": given["steps"], "device": "cpu"}
        config = build_config(agent, given={**given, **own})
        groups, threads = grouping(config.seeds, "cpu")
        run = Run(Path(folder), config, groups, threads, "cpu")
        inbox: queue.SimpleQueue[tuple[Worker, Any]] = queue.SimpleQueue()
        workers = {Worker(run, group, inbox) for group in groups}
        marks: dict[int, list[tuple[float, int]]] = {}
        seconds: dict[str, float] = {}
        while workers:
            worker, message = inbox.get()
            if message is None:
                workers.discard(worker)
            elif "error" in message:
                raise RuntimeError(message["error"])
            elif "seconds" in message:
                for part, value in message["seconds"].items():
                    seconds[part] = seconds.get(part, 0.0) + value
            elif "env_steps" in message:
                marks.setdefault(message["seed"], []).append(
                    (time.perf_counter(), message["env_steps"])
                )
        rate = sum((m[-1][1] - m[0][1]) / (m[-1][0] - m[0][0]) for m in marks.values())
        return rate, seconds
