"""ReDo against its oracles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from perennial.plasticity import (
    ReDo,
    attach,
    find_units,
    metrics,
)
from tests.fed import feed, gone, mlp, stage


@pytest.mark.parametrize("threshold", [0.0, 0.025, 0.1])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_redo_recycles_the_dormant_unit_at_any_scale(threshold: float, scale: float) -> None:
    net, units, handle = stage(4, ReDo(threshold=threshold, every=1))
    rows = net.inner.weight.detach().clone()
    h = scale * torch.tensor([[0.0, 1.0, -2.0, 4.0], [0.0, -1.0, 0.0, 0.0]])  # E|h| = 0, 1, 1, 2
    score = metrics.mean_size(h)
    assert (score / score.mean()).tolist() == [0, 1, 1, 2] and score.sum() / score.mean() == 4
    feed(units, handle, h)
    assert gone(net) == [[0]]
    changed = (net.inner.weight != rows).all(-1)
    assert changed.tolist() == [[True, False, False, False]]
    assert handle.counts()["redo"].tolist() == [1]


@pytest.mark.parametrize(("threshold", "expected"), [(0.99, [0]), (1.0, [0, 1, 2])])
def test_redo_compares_with_at_most(threshold: float, expected: list[int]) -> None:
    net, units, handle = stage(4, ReDo(threshold=threshold, every=1))
    feed(units, handle, torch.tensor([[0.0, 1.0, 1.0, 2.0]]))
    assert gone(net) == [expected]


def test_a_unit_that_is_always_zero_goes_without_changing_the_output() -> None:
    net = mlp(nn.ReLU())
    with torch.no_grad():
        net[0].bias[2] = -100.0
        net[2].bias[4] = -100.0
    units = find_units(net, torch.zeros(1, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach(ReDo(threshold=0.0, every=5), units, optimizer)
    x = torch.randn(64, 3)
    before = net(x).detach()
    weights = [p.detach().clone() for p in net.parameters()]
    for step in range(1, 6):
        net(x).sum().backward()
        optimizer.step()
        same = all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
        assert same == (step < 5), "nothing before the period, something after"
    assert torch.equal(net(x), before)
    assert handle.counts()["redo"].tolist() == [2]
    assert net[0].bias[2].abs() <= 1 / math.sqrt(3), "torch's default bias is drawn anew"
    assert net[0](x)[:, 2].relu().any() and net[2](net[0](x).relu())[:, 4].relu().any()


@pytest.mark.parametrize(("reference", "count"), [("exact", 3), ("paper", 3), ("nature", 0)])
def test_a_layer_of_zeros(reference: str, count: int) -> None:
    net, units, handle = stage(3, ReDo(threshold=0.1, every=1, reference=reference))
    feed(units, handle, torch.zeros(4, 3))
    assert handle.counts()["redo"].tolist() == [count]
    feed(units, handle, torch.tensor([[1.0, 0.0, 1.0]]))
    assert handle.counts()["redo"].tolist() == [count + 1] and 1 in gone(net)[0]


def test_redo_averages_the_last_minibatches_of_a_period() -> None:
    net, units, handle = stage(4, ReDo(threshold=0.5, every=5, batches=2))
    quiet, loud = torch.tensor([[0.1, 1.0, 1.0, 1.0]]), torch.tensor([[3.0, 1.0, 1.0, 1.0]])
    silent = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    feed(units, handle, loud, loud, loud, quiet, loud)  # 3.1 / 2 counts, not the first three
    assert gone(net) == [[]]
    feed(units, handle, loud, loud, loud, quiet)
    assert gone(net) == [[]]
    feed(units, handle, silent)
    assert gone(net) == [[0]]
    redo = handle.interventions["redo"]
    assert redo.score.abs().sum() == 0, "every period starts from nothing"


def test_copies_are_judged_alone_and_only_where_they_step() -> None:
    net, units, handle = stage(3, ReDo(threshold=0.1, every=2), copies=3)
    h = torch.tensor([[[0.0, 1, 1]], [[100.0, 0, 0]], [[0.01, 0.01, 0.01]]])
    feed(units, handle, h)
    feed(units, handle, h, active=[1, 2])
    assert gone(net) == [[], [1, 2], []]
    feed(units, handle, h, active=[0])
    assert gone(net) == [[0], [1, 2], []]
    assert handle.counts()["redo"].tolist() == [1, 2, 0]


def test_a_not_a_number_recycles_nothing() -> None:
    net, units, handle = stage(3, ReDo(threshold=0.5, every=1))
    feed(units, handle, torch.tensor([[0.0, 1.0, torch.nan]]))
    assert gone(net) == [[]]
    feed(units, handle, torch.tensor([[0.0, 1.0, 1.0]]))
    assert gone(net) == [[0]]


@pytest.mark.parametrize("reference", ["exact", "paper"])
def test_fresh_rows_are_drawn_as_the_layer_was_or_as_dopamine_draws(reference: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 10))
    with torch.no_grad():
        net[0].bias.fill_(-1000.0)
    own = net[0].weight.detach().clone()
    units = find_units(net, torch.zeros(1, 50))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    attach(ReDo(every=1, reference=reference), units, optimizer)
    net(torch.randn(8, 50)).sum().backward()
    optimizer.step()
    bound = 1 / math.sqrt(50) if reference == "exact" else math.sqrt(6 / 250)
    weight = net[0].weight.detach()
    assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.02
    assert (weight == own).sum() == 0, "a fresh draw, not the unit's first weights"
    assert net[2].weight.abs().sum() == 0
    assert (net[0].bias == 0).all() == (reference == "paper")


def test_where_both_ends_of_a_weight_are_recycled_it_is_zero() -> None:
    net = mlp(nn.ReLU())
    with torch.no_grad():
        net[0].bias[2] = net[2].bias[4] = -100.0
    units = find_units(net, torch.zeros(1, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach("redo:threshold=0,every=1", units, optimizer)
    row = net[2].weight[4].detach().clone()
    net(torch.randn(200, 3)).sum().backward()
    optimizer.step()
    assert net[2].weight[:, 2].tolist() == [0.0] * 5
    fresh = net[2].weight[4] != row
    assert (
        handle.counts()["redo"].tolist() == [2]
        and fresh.all()
        and net[2].weight[4].count_nonzero() == 5
    )


def test_saturated_tanh_and_negative_activations_are_not_dormant() -> None:
    net, units, handle = stage(3, ReDo(threshold=0.1, every=1))
    feed(units, handle, torch.tensor([[-1.0, 1.0, 0.5], [-1.0, -1.0, 0.5]]))
    assert gone(net) == [[]]
