"""The benchmark of DQN measures what it names."""

from __future__ import annotations

import io

import pytest
import torch

from perennial.agents import bench_dqn
from perennial.agents.config import build_config
from perennial.agents.q_network import build_q_net


def test_the_products_are_those_of_the_network() -> None:
    """Multiplications of the forward, counted, are those of the network that trains."""
    forward, backward = bench_dqn._products(2)
    config = build_config("dqn", given={"env": "perennial/AtariSwitch-v0"})
    net = build_q_net(config, (4, 84, 84), 18, 1, [torch.Generator()])
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for work in (forward, lambda: net(torch.zeros(1, 2, 4, 84, 84)), backward):
        with FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert 1.5 * counts[0] < counts[2] < 2 * counts[0]  # without the gradient by the pixels


def test_options_are_those_of_both() -> None:
    import inspect

    import stable_baselines3

    assert set(bench_dqn._OPTIONS) <= set(inspect.signature(stable_baselines3.DQN).parameters)
    build_config("dqn", given={"env": "CartPole-v1", **bench_dqn._OPTIONS})


@pytest.mark.slow
def test_all_is_measured_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**bench_dqn._OPTIONS, "learning_starts": 1800}
    for name, value in {
        "ROUNDS": 1, "_PONG_STEPS": 2000, "_PONG_WARM": 1700, "_CARTPOLE_STEPS": 2000,
        "_OPTIONS": options,
    }.items():  # fmt: skip
        monkeypatch.setattr(bench_dqn, name, value)
    stream = io.StringIO()
    found = bench_dqn.bench_dqn(stream)
    rates = {name: row[0] for name, row in found["env_steps_per_second"].items()}
    assert all(rate > 0 for rate in rates.values())
    assert {"sb3, Pong, 1 seed", "perennial, Pong, 1 seed", "Pong alone"} < set(rates)
    assert "Pong, 1 seed: perennial / sb3" in found["ratios"]
    assert "ratios" in stream.getvalue()
