"""Weight decay and the pull to the initial weights, against torch, autograd and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from perennial.plasticity import BatchedAdam, Init, attach, find_units, make
from tests.penalty_bench import NETS, Bench, mlp

every_net = pytest.mark.parametrize("kind", NETS)


# ---- weight decay ------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["weights", "all"])
def test_weight_decay_is_adamw(scope: str) -> None:
    ours, theirs = mlp(), mlp()
    x = torch.randn(7, 3).double()
    adam = torch.optim.Adam(ours.parameters(), lr=0.02)
    attach(f"weight-decay:strength=0.3,scope={scope}", find_units(ours, x), adam)
    decayed = [p for p in theirs.parameters() if scope == "all" or p.ndim > 1]
    others = [p for p in theirs.parameters() if scope != "all" and p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.02)
    for step in range(20):
        for net, optimizer in ((ours, adam), (theirs, adamw)):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + step)
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_weight_decay_without_gradient_shrinks_by_a_power_and_leaves_standing_copies() -> None:
    net = mlp(2)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = BatchedAdam(net.parameters(), lr=0.1)
    units = find_units(net, torch.zeros(2, 1, 3).double())
    handle = attach("weight-decay:strength=0.5,scope=layers", units, optimizer, hooks=False)
    for step in range(6):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        active = [True, step < 2]
        handle.before_step(active)
        optimizer.step(active)
        handle.after_step(active)
    for p, q in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p[0], q[0] * 0.95**6, rtol=1e-12, atol=0)
        torch.testing.assert_close(p[1], q[1] * 0.95**2, rtol=1e-12, atol=0)


def test_coupled_and_decoupled_are_the_same_under_sgd_and_not_under_adam() -> None:
    for adam in (False, True):
        coupled = Bench("plain", "l2:strength=0.2", adam=adam)
        apart = Bench("plain", "weight-decay:strength=0.2,scope=all", adam=adam)
        before = [p.detach().clone() for p in coupled.net.parameters()]
        for bench in (coupled, apart):
            bench.pulls()
            bench.optimizer.step()
        same = [
            torch.allclose(p, q, rtol=1e-12)
            for p, q in zip(coupled.net.parameters(), apart.net.parameters(), strict=True)
        ]
        assert all(same) != adam
        if adam:  # a first step is the learning rate, whatever the strength
            for p, q in zip(coupled.net.parameters(), before, strict=True):
                torch.testing.assert_close(p, q - 0.1 * q.sign(), rtol=0, atol=1e-5)


# ---- l2-init -----------------------------------------------------------------------------------


def sorted_distance(p: Tensor, q: Tensor, copies: bool) -> Tensor:
    rows = (p, q) if copies else (p[None], q[None])
    a, b = (t.flatten(1).sort(-1).values for t in rows)
    return (a - b).square().sum() / 2


@every_net
@pytest.mark.parametrize("options", ["", "distance=l1", "distance=norm", "distance=wasserstein",
                                     "average=true", "distance=l1,average=true"])  # fmt: skip
def test_l2_init_is_autograds_gradient(kind: str, options: str) -> None:
    bench = Bench(kind, f"l2-init:strength=0.3,scope=all,every=1,{options}".rstrip(","))
    copies = "cop" in kind
    first = {n: p.detach().clone() for n, p in bench.net.named_parameters()}
    for pull in bench.pulls().values():
        assert torch.equal(pull, torch.zeros_like(pull))  # also the unsquared norm: no NaN
    bench.perturb()

    def penalty() -> Tensor:
        pairs = [(p, first[n]) for n, p in bench.net.named_parameters()]
        if "norm" in options:
            squares = [(p - q).square() for p, q in pairs]
            if copies:
                return torch.stack([s.flatten(1).sum(1) for s in squares]).sum(0).sqrt().sum()
            return torch.cat([s.flatten() for s in squares]).sum().sqrt()
        total = torch.zeros((), dtype=torch.float64)
        for p, q in pairs:
            if "wasserstein" in options:
                term = sorted_distance(p, q, copies)
            elif "l1" in options:
                term = (p - q).abs().sum()
            else:
                term = (p - q).square().sum() / 2
            numel = p[0].numel() if copies else p.numel()
            total = total + (term / numel if "average" in options else term)
        return total

    bench.check(lambda: 0.3 * penalty())


def test_l2_init_without_gradient_comes_back_by_a_power() -> None:
    for spec in ("l2-init:strength=0.2", "l2-init:strength=0.2,decoupled=true"):
        bench = Bench("plain", spec)
        first = [p.detach().clone() for p in bench.net.parameters()]
        bench.perturb()
        second = [p.detach().clone() for p in bench.net.parameters()]
        for _ in range(5):
            bench.pulls()
            bench.optimizer.step()
            bench.handle.after_step()
        for p, a, b in zip(bench.net.parameters(), first, second, strict=True):
            torch.testing.assert_close(p - a, 0.98**5 * (b - a), rtol=1e-10, atol=1e-14)


def test_wasserstein_is_blind_to_order_and_its_order_stands_between_sorts() -> None:
    bench = Bench("plain", "l2-init:distance=wasserstein,every=3,strength=1")
    with torch.no_grad():
        for p in bench.net.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel())].view(p.shape))
    for pull in bench.pulls().values():
        torch.testing.assert_close(pull, torch.zeros_like(pull), rtol=0, atol=1e-15)
    with torch.no_grad():
        bench.net[0].weight.copy_(bench.net[0].weight.flip(0))
    for expected in (True, True, False):  # steps 1, 2 keep the order of step 0; 3 sorts again
        bench.handle.after_step()
        pull = bench.pulls()["0.weight"]
        assert bool(pull.abs().max() > 1e-3) == expected
    assert Bench("plain", "l2-init:every=3").pulls()["0.weight"].abs().max() == 0


def test_l2_init_scopes_and_clashes() -> None:
    def pulled(scope: str) -> set[str]:
        bench = Bench("image", f"l2-init:scope={scope}")
        bench.perturb()
        return {name for name, pull in bench.pulls().items() if pull.any()}

    layers = {f"{k}.{p}" for k in (0, 3, 6) for p in ("weight", "bias")}
    assert pulled("layers") == layers
    assert pulled("all") == layers | {"4.weight", "4.bias"}
    assert pulled("weights") == {name for name in layers if "weight" in name}
    with pytest.raises(ValueError, match="distance=norm and average=true clash"):
        make("l2-init:distance=norm,average=true")
    with pytest.raises(ValueError, match="distance=wasserstein and resample=true clash"):
        make("l2-init:distance=wasserstein,resample=true")


def test_resampled_l2_init_pulls_to_the_initial_distribution_anew_each_step() -> None:
    net = mlp(2, (200, 30, 2))
    net[0].init = Init("lecun-uniform")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    units = find_units(net, torch.zeros(2, 1, 200).double())
    handle = attach("l2-init:resample=true,strength=1", units, optimizer, hooks=False)
    targets = []
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        handle.before_step()
        handle.after_step()
        weight = net[0].weight
        targets.append((weight - weight.grad).detach())
        torch.testing.assert_close(net[0].bias.grad, net[0].bias.detach(), rtol=0, atol=1e-15)
    bound = math.sqrt(3 / 200)
    for target in targets:
        assert 0.99 * bound < target.abs().max() <= bound
        assert abs(target.mean()) < 4 * bound / math.sqrt(3 * target.numel())
    assert not torch.equal(*targets) and not torch.equal(targets[0][0], targets[0][1])
