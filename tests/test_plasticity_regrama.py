"""ReGraMa against its oracles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from perennial.plasticity import (
    Intervention,
    ReDo,
    ReGraMa,
    attach,
    find_units,
)
from tests.fed import ConvNet, gone, mlp, stage, train


def tanh_net() -> nn.Sequential:
    """Unit 2 of the first layer saturated, unit 4 of the second (a ReLU) dead."""
    net = mlp(nn.Tanh()).double()
    with torch.no_grad():
        net[0].bias[2] = 50.0
        net[2].bias.fill_(0.5)  # the others surely fire
        net[2].bias[4] = -100.0
    return net


@pytest.mark.parametrize(("method", "recycled"), [
    (ReGraMa(threshold=1e-6, every=1), ([2], [4])), (ReDo(threshold=0.025, every=1), ([], [4])),
])  # fmt: skip
def test_gradients_find_saturated_units_and_both_find_dead_ones(
    method: Intervention, recycled: tuple[list[int], list[int]]
) -> None:
    net = tanh_net()
    units = find_units(net, torch.zeros(1, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    attach(method, units, optimizer)
    train(net, optimizer, 1, (64, 3))
    columns = [[c for c in range(w.shape[1]) if not w[:, c].any()] for w in
               (net[2].weight, net[4].weight)]  # fmt: skip
    assert tuple(columns) == recycled


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_score_is_the_relative_mean_gradient_whatever_the_loss_is_multiplied_by(
    scale: float,
) -> None:
    torch.manual_seed(5)
    net = ConvNet().double()
    units = find_units(net, torch.zeros(1, 2, 10, 10, dtype=torch.float64))
    method = ReGraMa(every=3, batches=2)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach(method, units, optimizer, hooks=False)
    expected = torch.zeros(1, units.total, dtype=torch.float64)
    for step in range(3):
        x = torch.randn(4, 2, 10, 10, dtype=torch.float64)
        optimizer.zero_grad()
        (scale * net(x).square().mean()).backward()
        if step:
            for site, span in zip(units, units.spans, strict=True):
                layer = getattr(net, site.name)
                for i in range(site.n):
                    entries = [*layer.weight.grad[i].flatten().tolist(), layer.bias.grad[i].item()]
                    expected[0, span.start + i] += sum(map(abs, entries)) / len(entries) / (
                        (layer.weight.grad.abs().sum() + layer.bias.grad.abs().sum()).item()
                        / (len(entries) * site.n)
                    )  # fmt: skip
        if step == 2:
            break
        handle.before_step()
        handle.after_step()
    handle.before_step()
    torch.testing.assert_close(method.score, expected)
    assert method.seen.tolist() == [[2, 2, 2]]
    for span in units.spans:  # the scores of a layer average to 1
        assert math.isclose(method.score[0, span].mean(), 2)
    handle.after_step()
    assert method.score.count_nonzero() == 0 and method.seen.count_nonzero() == 0


def test_penalties_and_clipping_do_not_hide_a_unit_without_gradient() -> None:
    net = tanh_net()
    units = find_units(net, torch.zeros(1, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach(["l2:strength=10", "regrama:threshold=1e-6,every=1"], units, optimizer)
    x = torch.randn(64, 3, dtype=torch.float64)
    net(x).sub(1).square().mean().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()
    assert handle.counts()["regrama"].tolist() == [2]
    assert net[0].weight.grad[2].abs().sum() > 0, "the penalty did join the gradient"


@pytest.mark.parametrize("middle", [
    (nn.LayerNorm(6), nn.ReLU()), (nn.ReLU(), nn.LayerNorm(6)), (nn.BatchNorm1d(6), nn.ReLU()),
])  # fmt: skip
def test_a_dead_unit_beside_a_norm_has_no_gradient_score(middle: tuple[nn.Module, ...]) -> None:
    net = mlp(*middle)
    kind = type(middle[0])
    with torch.no_grad():
        net[0].bias.fill_(0.5)
        (net[0] if kind is nn.ReLU else net[1]).bias[2] = -100.0
    units = find_units(net, torch.zeros(2, 3))
    method = ReGraMa(threshold=1e-6, every=2, batches=1)
    handle = attach(method, units, torch.optim.SGD(net.parameters(), 0.0), hooks=False)
    handle.before_step()
    handle.after_step()
    net(torch.randn(64, 3)).sub(1).square().mean().backward()
    handle.before_step()
    assert (method.score[0, :6] < 1e-6).tolist() == [i == 2 for i in range(6)]
    assert (net[0].weight.grad[2].abs().sum() > 1e-3) == (kind is nn.LayerNorm)


def test_a_layer_that_takes_no_part_in_the_loss_is_left_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(nn.ReLU()), mlp(nn.ReLU())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    net = Two()
    with torch.no_grad():
        net.a[0].bias[2] = net.b[0].bias[2] = -100.0
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    units = find_units(net, torch.zeros(1, 3))
    handle = attach(ReGraMa(threshold=0.0, every=1), units, optimizer)
    other = [p.detach().clone() for p in net.b.parameters()]
    net(torch.randn(8, 3))[0].sum().backward()
    optimizer.step()
    assert handle.counts()["regrama"] >= 1 and net.a[2].weight[:, 2].abs().sum() == 0
    assert all(torch.equal(p, q) for p, q in zip(net.b.parameters(), other, strict=True))


def test_one_copy_without_gradient_does_not_touch_another() -> None:
    net, _, handle = stage(3, ReGraMa(threshold=0.1, every=1), copies=2)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net.inner.weight.grad[1] = net.inner.bias.grad[1] = 0.0
    net.inner.weight.grad[0, 2] = net.inner.bias.grad[0, 2] = 0.0
    handle.before_step(active=[0])
    handle.after_step(active=[0])
    assert gone(net) == [[2], []]
    handle.before_step(active=[1])
    handle.after_step(active=[1])
    assert gone(net) == [[2], [0, 1, 2]]
