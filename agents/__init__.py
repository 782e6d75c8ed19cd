"""Agents that keep learning: `train` starts a run, `load` gives what it learned.

    run = train("ppo", env="perennial/SlipperyAnt-v0", steps=1_000_000, seeds=4, plasticity=["cbp"])
    action = load(run).act(observation)

The command line is `perennial`, also `python -m perennial.agents`. Importing this package imports
no torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perennial.agents.evaluate import Policy
    from perennial.agents.run import Run

__all__ = ["load", "train"]


def train(agent: str, *, preset: str | None = None, **options: Any) -> Run:
    """Train as `perennial train AGENT` does, in processes of its own; returns the finished run.

    Args:
        agent: "ppo".
        preset: a published protocol to start from.
        options: the command's options with underscores (`env`, `steps`, `seeds`, `plasticity`,
        ...).

    Raises:
        ValueError: an option is unknown or impossible; one line.
        RuntimeError: a seed failed; the run's folder keeps the others.
        KeyboardInterrupt: stopped by the user, after a checkpoint.
    """
    from perennial.agents import run as runs
    from perennial.agents.config import build_config

    run, status = runs.train(build_config(agent, preset, options))
    if status in (130, 143):
        raise KeyboardInterrupt
    if status:
        raise RuntimeError(f"training failed in {run.path}: see the errors above")
    return run


def load(run: Run | str | os.PathLike[str], seed: int | None = None) -> Policy:
    """The trained policy of one seed (the first unless told) of a run or its folder.

    Raises:
        ValueError: no run, no such seed, or no good checkpoint; one line.
    """
    from perennial.agents.evaluate import Policy
    from perennial.agents.run import Run

    found = run if isinstance(run, Run) else Run.open(run)
    return Policy(found, found.config.seeds[0] if seed is None else seed)
