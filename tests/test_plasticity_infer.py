"""Initial feature regularisation, against autograd and by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from perennial.plasticity import attach, find_units
from tests.penalty_bench import NETS, Bench

every_net = pytest.mark.parametrize("kind", NETS)


class Shared(nn.Module):
    """A trunk with two heads, called as one module; it has dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6)
        )
        self.policy, self.value = nn.Linear(6, 2), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.policy(h), self.value(h)


def infer_penalty(
    features: Callable[[], Tensor], first: Tensor, state: dict[str, Tensor], scale: float
) -> Tensor:
    heads, first_heads = state["infer.heads_0"], state["infer.first_heads_0"]
    h, h0 = (t if t.ndim == 3 else t[None] for t in (features(), first))
    error = h @ heads.mT - scale * (h0 @ first_heads.mT)
    return error.square().sum(-1).mean(1).sum()


@every_net
def test_infer_is_autograds_gradient(kind: str) -> None:
    bench = Bench(kind, "infer:strength=0.3,heads=4,scale=3,every=1")

    def features() -> Tensor:
        return bench.net[:-1](bench.x)

    first = features().detach()
    state = bench.handle.state_dict()
    bench.check(lambda: 0.3 * infer_penalty(features, first, state, 3.0))
    # At attach: (beta - 1)^2 times the heads' own squares.
    rows = first if first.ndim == 3 else first[None]
    squares = (rows @ state["infer.heads_0"].mT).square().sum(-1).mean(1).sum()
    at_start = infer_penalty(features, first, state, 3.0)
    torch.testing.assert_close(at_start, 4 * squares, rtol=1e-12, atol=0)
    bench.handle.after_step()
    bench.perturb()
    state = bench.handle.state_dict()
    bench.check(lambda: 0.3 * infer_penalty(features, first, state, 3.0))


def test_infer_starts_at_zero_with_scale_one_and_learns_heads_not_first_ones() -> None:
    bench = Bench("two copies", "infer:scale=1,every=1,strength=1")
    for pull in bench.pulls().values():
        torch.testing.assert_close(pull, torch.zeros_like(pull), rtol=0, atol=1e-14)
    before = bench.handle.state_dict()
    bench.perturb()
    for _ in range(3):
        bench.pulls()
        bench.handle.after_step()
    after = bench.handle.state_dict()
    for key, value in before.items():
        if "first_heads" in key or "frozen" in key:
            assert torch.equal(value, after[key]), key
    assert not torch.equal(before["infer.heads_0"], after["infer.heads_0"])
    assert not torch.equal(after["infer.heads_0"][0], after["infer.heads_0"][1])


def test_infer_brings_features_back() -> None:
    bench = Bench("plain", "infer:scale=1,every=1,strength=1", lr=0.05)
    first = bench.net[:-1](bench.x).detach()
    bench.perturb(0.2)
    state = bench.handle.state_dict()

    def loss() -> float:
        return infer_penalty(lambda: bench.net[:-1](bench.x), first, state, 1.0).item()

    start = loss()
    for _ in range(200):
        bench.pulls()
        bench.optimizer.step()
        bench.handle.after_step()
        state = bench.handle.state_dict()
    assert loss() < 0.1 * start


def test_infer_on_a_shared_trunk_disturbs_neither_modes_nor_streams_nor_statistics() -> None:
    torch.manual_seed(0)
    net = Shared().double()
    x = torch.randn(16, 3).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    units = find_units(net, x)
    handle = attach("infer:every=1,scale=3,strength=0.3,heads=4", units, optimizer, hooks=False)
    assert [k for k in handle.state_dict() if "first_heads" in k] == ["infer.first_heads_0"]
    net.train()
    a, b = net(x)
    (a.sum() * 0 + b.sum() * 0).backward()
    rng, statistics = torch.get_rng_state(), net.body[1].running_mean.clone()
    recorded, state = [site.raw for site in units], handle.state_dict()
    net.zero_grad(set_to_none=False)
    handle.before_step()
    assert torch.equal(rng, torch.get_rng_state()) and net.body[1].training and net.training
    assert torch.equal(statistics, net.body[1].running_mean)
    assert all(site.raw is raw for site, raw in zip(units, recorded, strict=True))
    net.eval()
    assert not torch.equal(statistics, torch.zeros(8).double())  # they moved since attach
    frozen = copy.deepcopy(net)
    frozen.body[1].reset_running_stats()
    first = frozen.body(x).tanh().detach()
    penalty = 0.3 * infer_penalty(lambda: net.body(x).tanh(), first, state, 3.0)
    params = list(net.body.parameters())
    for p, g in zip(params, torch.autograd.grad(penalty, params), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
    assert not net.policy.weight.grad.any() and not net.value.weight.grad.any()


def test_infer_says_in_one_line_where_it_does_not_fit() -> None:
    class Apart(nn.Module):
        """Layers that are called one by one, never through a module."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def act(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    net = Apart()
    x = torch.randn(5, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach("infer", find_units(net, x, net.act), optimizer)
    net.act(x).sum().backward()
    with pytest.raises(ValueError, match="no training forward of 'the model'") as error:
        optimizer.step()
    assert "\n" not in str(error.value)

    class Wider(nn.Module):
        """What the trunk returns is not what the output layer reads."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat((self.body(x), x), -1))

    wider = Wider()
    optimizer = torch.optim.SGD(wider.parameters(), lr=0.1)
    attach("infer", find_units(wider, x), optimizer)
    wider(x).sum().backward()
    with pytest.raises(ValueError, match="what 'body' returns is not what the output layer 'last'"):
        optimizer.step()


class Twins(nn.Module):
    """Two inputs, as critics have; the trunk before each head is the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
        self.first = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        return self.first(self.body(torch.cat((x, action), -1)))


def test_infer_on_a_module_of_two_inputs() -> None:
    torch.manual_seed(0)
    net = Twins().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    zeros = torch.zeros(1, 3).double(), torch.zeros(1, 2).double()
    units = find_units(net, zeros, lambda both: net(*both))
    handle = attach("infer:every=1,scale=3,strength=0.3,heads=4", units, optimizer, hooks=False)
    x, action = torch.randn(7, 3).double(), torch.randn(7, 2, requires_grad=True).double()
    (0 * net(x, action).sum()).backward()
    state = handle.state_dict()

    def features() -> Tensor:
        return net.first[:2](net.body(torch.cat((x, action.detach()), -1)))

    penalty = 0.3 * infer_penalty(features, features().detach(), state, 3.0)
    params = [*net.body.parameters(), *net.first[0].parameters()]
    net.zero_grad(set_to_none=False)
    handle.before_step()
    for p, g in zip(params, torch.autograd.grad(penalty, params), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [Shared, Twins])
def test_a_detached_infer_leaves_no_hook_behind(make: Callable[[], nn.Module]) -> None:
    net = make()
    inputs = (torch.zeros(1, 3),) if make is Shared else (torch.zeros(1, 3), torch.zeros(1, 2))
    units = find_units(net, inputs, lambda given: net(*given))

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())

    before = hooks()
    handle = attach("infer", units, torch.optim.SGD(net.parameters(), lr=0.1))
    assert hooks() > before
    handle.detach()
    assert hooks() == before
    assert all(site.raw is None for site in units)
    net.eval()(*inputs)
    assert all(site.raw is not None for site in units)  # these are the units' own
    units.close()
    assert hooks() == 0
