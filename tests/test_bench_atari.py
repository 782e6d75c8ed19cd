"""The benchmark of Atari engines runs what it names."""

from __future__ import annotations

import io

import pytest

from perennial.agents import bench_atari, side_by_side


def test_engines_and_parts_are_measured_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_atari, "_SECONDS", 0.02)
    monkeypatch.setattr(bench_atari, "_LANES", 2)
    monkeypatch.setattr(bench_atari, "ROUNDS", 1)
    stream = io.StringIO()
    found = bench_atari.bench_atari(stream)
    rates = {name: row[0] for name, row in found["env_steps_per_second"].items()}
    assert all(rate > 100 for rate in rates.values())
    assert {"perennial, 1 lane", "AtariVectorEnv, 2 lanes, 2 threads"} < set(rates)
    ours, alone = rates["perennial, 1 lane"], rates["four frames of a console, no picture"]
    assert found["ratios"]["1 lane: perennial / the console's frames"] == ours / alone
    assert "ratios" in stream.getvalue()
    assert side_by_side.ROUNDS == 3
