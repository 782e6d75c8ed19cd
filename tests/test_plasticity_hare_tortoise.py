"""hare-tortoise against its oracles."""

import copy

import pytest
import torch
from torch import nn

from perennial.plasticity import attach, find_units, make

from .nets import OPTIMIZERS, batched, plain, put_to, same, train, weights


def test_the_tortoise_of_a_constant_hare() -> None:
    net = plain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    handle = put_to(net, "hare-tortoise:every=0,momentum=0.9", optimizer)
    method = handle.interventions["hare-tortoise"]
    for name, buffer in method.named_buffers():
        if name.startswith("tortoise"):
            buffer.zero_()
    for n in range(1, 6):
        train(net, optimizer, range(1))
        for place, p in enumerate(net.parameters()):
            slow = method.get_buffer(f"tortoise{place}")[0]
            torch.testing.assert_close(slow, (1 - 0.9**n) * p.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("copies", [0, 2])
def test_the_hare_takes_over_by_copy(copies: int) -> None:
    net = batched(2) if copies else plain()
    optimizer = OPTIMIZERS["batched" if copies else "adam"](list(net.parameters()))
    handle = put_to(net, "hare-tortoise:every=4,momentum=0.75", optimizer)
    method = handle.interventions["hare-tortoise"]
    twin = copy.deepcopy(net)
    other = OPTIMIZERS["batched" if copies else "adam"](list(twin.parameters()))
    slow = weights(twin)
    for step in range(4):
        train(net, optimizer, range(step, step + 1))
        train(twin, other, range(step, step + 1))
        slow = [0.75 * s + 0.25 * p.detach() for s, p in zip(slow, twin.parameters(), strict=True)]
    for place, (p, s) in enumerate(zip(net.parameters(), slow, strict=True)):
        tortoise = method.get_buffer(f"tortoise{place}")
        torch.testing.assert_close(p.detach(), s, rtol=0, atol=1e-14)
        assert torch.equal(tortoise if copies else tortoise[0], p)
        assert tortoise.data_ptr() != p.data_ptr()
    before = [method.get_buffer(f"tortoise{place}").clone() for place in range(6)]
    train(net, optimizer, range(4, 5))
    assert not same(before, weights(net))  # the next step moves them apart


@pytest.mark.parametrize("spec", ["momentum=0,every=3", "momentum=0.5,every=0"])
def test_hare_tortoise_at_its_null_settings(spec: str) -> None:
    results = []
    for specs in ([], [f"hare-tortoise:{spec}"]):
        net = plain()
        optimizer = OPTIMIZERS["adam"](list(net.parameters()))
        put_to(net, specs, optimizer)
        train(net, optimizer, range(8))
        results.append(weights(net))
    assert same(*results)


def test_the_tortoise_averages_running_statistics_and_can_be_tried_out() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    x = torch.randn(16, 3)
    method = make("hare-tortoise:every=0,momentum=0.5")
    attach(method, find_units(net, x), optimizer)
    norm, mean = net[1], torch.zeros(8)
    for _ in range(4):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        mean = 0.5 * mean + 0.5 * norm.running_mean
    fast, output = weights(net), net.eval()(x)
    with method.swapped():
        torch.testing.assert_close(norm.running_mean, mean)
        assert not torch.equal(net(x), output)
        assert int(norm.num_batches_tracked) == 4
    assert same(weights(net), fast)
    assert torch.equal(net(x), output)
