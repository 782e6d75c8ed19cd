"""Throughput side by side with peers: `perennial bench NAME`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from perennial.agents.bench_atari import bench_atari
from perennial.agents.bench_dqn import bench_dqn
from perennial.agents.bench_plasticity import bench_plasticity
from perennial.agents.bench_ppo import bench_ppo
from perennial.agents.bench_sac import bench_sac
from perennial.agents.config import UsageError
from perennial.agents.options import nearest

BENCHES: dict[str, Callable[[TextIO], dict[str, Any]]] = {
    "ppo": bench_ppo,
    "sac": bench_sac,
    "dqn": bench_dqn,
    "atari": bench_atari,
    "plasticity": bench_plasticity,
}


def main(names: list[str], json_file: str | None, stream: TextIO) -> int:
    """`perennial bench`: run the named benchmarks, all without a name; keep the figures."""
    for name in names:
        if name not in BENCHES:
            raise UsageError(f"unknown benchmark {name!r}{nearest(name, BENCHES)}")
    if json_file is not None and not Path(json_file).resolve().parent.is_dir():
        raise UsageError(f"--json {json_file}: its folder does not exist")
    results = {name: BENCHES[name](stream) for name in names or BENCHES}
    if json_file is not None:
        Path(json_file).write_text(json.dumps(results, indent=1) + "\n")
    return 0
