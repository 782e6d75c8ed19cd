"""Self-normalised resets against their oracles and against the rule unit by unit."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from perennial.plasticity import (
    SelfNormalizedResets,
)
from tests.fed import feed, gone, stage


def firing(pattern: str) -> list[Tensor]:
    """One unit of two that fires where the pattern has an x (the other always does)."""
    fires, not_ = torch.tensor([[-1.0, 1], [0.5, -1]]), torch.tensor([[-1.0, 1], [0.0, -1]])
    return [fires if mark == "x" else not_ for mark in pattern]


def test_a_unit_that_fires_in_every_minibatch_is_never_reset() -> None:
    net, units, handle = stage(2, SelfNormalizedResets(initial=1, every=3, check=1))
    feed(units, handle, *firing("x" * 20))
    assert gone(net) == [[]] and handle.interventions["snr"].tau.tolist() == [[1, 1]]


@pytest.mark.parametrize("tau", [1, 2, 7])
def test_silence_of_tau_minibatches_resets_exactly_then(tau: int) -> None:
    net, units, handle = stage(2, SelfNormalizedResets(initial=tau, every=1000, check=1))
    snr = handle.interventions["snr"]
    feed(units, handle, *firing("x" + "." * (tau - 1) + "x" + "." * (tau - 1)))
    assert gone(net) == [[]]
    feed(units, handle, *firing("."))
    assert gone(net) == [[0]] and handle.counts()["snr"].tolist() == [1]
    assert snr.silent.tolist() == [[0, 0]] and snr.tau.tolist() == [[tau, tau]]
    assert snr.silences[0, 0].sum() == (2 if tau > 1 else 1), "the reset is logged as a silence"
    feed(units, handle, *firing("." * tau))
    assert handle.counts()["snr"].tolist() == [2]


@pytest.mark.parametrize("unit", [1, 3])
def test_tau_is_the_percentile_of_the_units_silences(unit: int) -> None:
    """Silences (B, B, B, 10 B) with percentile 0.75 give B."""
    times = [unit, unit, unit, 10 * unit]
    pattern = "".join("." * t + "x" for t in times)
    method = SelfNormalizedResets(percentile=0.75, initial=50, every=len(pattern), check=1)
    net, units, handle = stage(2, method)
    feed(units, handle, *firing(pattern[:-1]))
    assert method.tau.tolist() == [[50, 50]]
    feed(units, handle, *firing("x"))
    assert method.tau.tolist() == [[unit, 50]], "a unit that was never silent keeps its tau"
    assert method.silences.sum() == 0 and gone(net) == [[]]


def test_tau_doubles_where_silences_reach_it_and_stays_in_bounds() -> None:
    method = SelfNormalizedResets(initial=4, every=8, maximum=10, check=1)
    _, units, handle = stage(2, method)
    feed(units, handle, *firing("." * 8))
    assert method.tau.tolist() == [[8, 4]] and method.replaced.tolist() == [2]
    feed(units, handle, *firing("." * 8))
    assert method.tau.tolist() == [[10, 4]] and method.replaced.tolist() == [3]
    short = SelfNormalizedResets(percentile=0.5, initial=9, every=10, minimum=5, check=1)
    _, units, handle = stage(2, short)
    feed(units, handle, *firing(".x" * 5))
    assert short.tau.tolist() == [[5, 9]]


def test_a_handful_of_silences_does_not_shorten_tau() -> None:
    method = SelfNormalizedResets(percentile=0.9, initial=50, every=40, check=1)
    _, units, handle = stage(2, method)
    feed(units, handle, *firing(".x" * 9 + "x" * 22))  # nine of the ten that 0.9 needs
    assert method.tau.tolist() == [[50, 50]]
    feed(units, handle, *firing(".x" * 10 + "x" * 20))
    assert method.tau.tolist() == [[1, 50]]


def test_bins_of_silences() -> None:
    method = SelfNormalizedResets(maximum=5000)
    stage(2, method)
    steps = torch.arange(1, 5001)
    tops = method._tops[method._bin(steps)]
    assert (tops >= steps).all() and torch.equal(tops[:16], steps[:16])
    assert ((tops - steps) / steps).max() < 0.12
    assert method._bin(torch.tensor([9999])).item() == len(method._tops) - 1


@pytest.mark.parametrize("check", [1, 3])
def test_resets_against_the_rule_unit_by_unit(check: int) -> None:
    n, copies, steps = 6, 2, 400
    method = SelfNormalizedResets(percentile=0.8, initial=4, every=50, maximum=12, check=check)
    _, units, handle = stage(n, method, copies)
    chance = random.Random(0)
    rates = [[chance.choice((0.05, 0.3, 0.6, 0.95)) for _ in range(n)] for _ in range(copies)]
    silent = [[0] * n for _ in range(copies)]
    tau = [[4] * n for _ in range(copies)]
    logs = [[Counter[int]() for _ in range(n)] for _ in range(copies)]
    replaced = [0] * copies
    for step in range(1, steps + 1):
        fires = [[chance.random() < rate for rate in row] for row in rates]
        feed(units, handle, torch.tensor(fires).double().unsqueeze(1) - 0.5)
        for s in range(copies):
            for i in range(n):
                log = logs[s][i]
                if fires[s][i]:
                    log[silent[s][i]] += silent[s][i] > 0
                    silent[s][i] = 0
                else:
                    silent[s][i] += 1
                if step % check == 0 and silent[s][i] >= tau[s][i]:
                    log[min(silent[s][i], 12)] += 1
                    silent[s][i] = 0
                    replaced[s] += 1
                lengths = sorted(log.elements())
                if step % 50 == 0 and lengths:
                    reached = lengths[max(0, math.ceil(0.8 * len(lengths) - 1e-9) - 1)]
                    if reached >= tau[s][i]:
                        tau[s][i] = min(12, 2 * tau[s][i])
                    elif len(lengths) >= 5:
                        tau[s][i] = reached
                if step % 50 == 0:
                    log.clear()
        assert method.silent.tolist() == silent
        assert method.tau.tolist() == tau
        assert method.replaced.tolist() == replaced
    assert min(replaced) > 10 and len({t for row in tau for t in row}) > 2


def test_standing_copies_do_not_grow_silent() -> None:
    method = SelfNormalizedResets(initial=3, check=1, every=1000)
    net, units, handle = stage(2, method, copies=2)
    silent = torch.zeros(2, 1, 2)
    feed(units, handle, silent, silent)
    feed(units, handle, silent, silent, active=[1])
    assert method.silent.tolist() == [[2, 2], [1, 1]] and gone(net) == [[], [0, 1]]
    feed(units, handle, silent, active=[0])
    assert gone(net) == [[0, 1], [0, 1]] and method.replaced.tolist() == [2, 2]
