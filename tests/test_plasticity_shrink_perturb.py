"""shrink-perturb against its oracles, variant by variant."""

import math

import pytest
import torch
from torch import nn

from perennial.plasticity import BatchedAdam, Init, attach, find_units

from .nets import OPTIMIZERS, batch, batched, plain, put_to, same, train, weights


def wide(init: Init | None = None, bias: bool = True) -> nn.Sequential:
    """20-60-200: enough weights for statistics; the layers say how they were drawn."""
    net = nn.Sequential(nn.Linear(20, 60, bias=bias), nn.ReLU(), nn.Linear(60, 200, bias=bias))
    net = net.double()
    for layer in (net[0], net[2]):
        if init is not None:
            layer.init = init  # type: ignore[assignment]
    return net


def run(net: nn.Module, spec: str, steps: int) -> None:
    """Events without training: no weight has a gradient."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    units = find_units(net, torch.zeros(1, 20, dtype=torch.float64))
    attach(spec, units, optimizer)
    for _ in range(steps):
        optimizer.step()


@pytest.mark.parametrize("draw", ["init", "normal", "initial"])
@pytest.mark.parametrize("scope", ["weights", "all"])
def test_shrink_1_noise_0_is_the_identity(draw: str, scope: str) -> None:
    results = []
    for specs in ([], [f"shrink-perturb:shrink=1,noise=0,every=1,draw={draw},scope={scope}"]):
        net = plain()
        optimizer = OPTIMIZERS["adam"](list(net.parameters()))
        put_to(net, specs, optimizer)
        train(net, optimizer, range(6))
        results.append(weights(net))
    assert same(*results)


@pytest.mark.parametrize(
    ("init", "std"),
    [
        (Init("torch-default", bias="torch-default"), lambda fan: 1 / math.sqrt(3 * fan)),
        (Init("lecun-uniform"), lambda fan: 1 / math.sqrt(fan)),
        (Init("kaiming-uniform", 2.0), lambda fan: 2 / math.sqrt(fan)),
    ],
)
def test_shrink_0_noise_1_is_a_fresh_network(init: Init, std) -> None:  # type: ignore[no-untyped-def]
    net = wide(init)
    run(net, "shrink-perturb:shrink=0,noise=1,every=1", 1)
    for layer, fan in ((net[0], 20), (net[2], 60)):
        weight, bias = layer.weight.detach(), layer.bias.detach()
        assert float(weight.std()) == pytest.approx(std(fan), rel=0.05)
        assert float(weight.abs().max()) <= math.sqrt(3) * std(fan)
        assert bool(bias.any()) == (init.bias != "zeros")


def test_a_fresh_orthogonal_network_is_orthogonal() -> None:
    net = wide(Init("orthogonal", 1.5))
    run(net, "shrink-perturb:shrink=0,noise=1,every=1", 1)
    for layer in (net[0], net[2]):
        gram = layer.weight.mT @ layer.weight
        torch.testing.assert_close(gram, 2.25 * torch.eye(len(gram)).double(), rtol=0, atol=1e-12)


def test_noise_and_decay_every_step_settle_at_their_variance() -> None:
    """w <- (1 - c) w + N(0, s^2): s^2 / (1 - (1 - c)^2); on every weight and bias."""
    net = wide()
    run(net, "shrink-perturb:shrink=0.7,noise=0.01,every=1,draw=normal", 60)
    everything = torch.cat([p.detach().flatten() for p in net.parameters()])
    expected = 1e-4 / (1 - 0.7**2)
    assert float(everything.var()) == pytest.approx(expected, rel=0.05)
    kurtosis = float((everything / everything.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("beta", [0.8, 0.5])
@pytest.mark.parametrize("keeps", [False, True])
def test_repeated_convex_events_shrink_the_scale_unless_variance_is_kept(
    beta: float, keeps: bool
) -> None:
    net = wide(Init("lecun-uniform"))
    noise = math.sqrt(1 - beta**2) if keeps else 1 - beta
    run(net, f"shrink-perturb:shrink={beta},noise={noise!r},every=1", 60)
    factor = 1.0 if keeps else math.sqrt((1 - beta) / (1 + beta))
    for layer, fan in ((net[0], 20), (net[2], 60)):
        assert float(layer.weight.detach().std()) == pytest.approx(
            factor / math.sqrt(fan), rel=0.05
        )


def test_shrinking_a_network_without_biases_scales_its_output() -> None:
    net = plain(bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    put_to(net, "shrink-perturb:shrink=0.5,noise=0,every=1", optimizer)
    x = batch(1)
    before = net(x).detach()
    optimizer.step()
    assert torch.equal(net(x), 0.125 * before)


def test_ash_and_adams_act_at_changes_with_a_new_optimizer() -> None:
    net = plain()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    spec = "shrink-perturb:shrink=0.4,noise=0.1,every=0,change=true,optimizer=reset"
    handle = put_to(net, spec, optimizer)
    train(net, optimizer, range(5))
    before = weights(net)
    handle.on_change()
    assert not any(v.any() for state in optimizer.state.values() for v in state.values())
    noises = []
    for _ in range(2):
        noise = [
            (p.detach() - 0.4 * q) / 0.1 for p, q in zip(net.parameters(), before, strict=True)
        ]
        for value, fan in zip(noise, (3, 3, 16, 16, 16, 16), strict=True):
            bound = 1 / math.sqrt(fan)
            assert float(value.abs().max()) <= bound * (1 + 1e-12)
            assert value.numel() < 40 or float(value.abs().max()) > 0.9 * bound
        noises.append(noise)
        before = weights(net)
        handle.on_change()
    assert not any(torch.equal(a, b) for a, b in zip(*noises, strict=True))


@pytest.mark.parametrize("head", ["shrink", "reset", "keep"])
def test_heads_of_the_convex_variants(head: str) -> None:
    net = plain()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    put_to(net, f"shrink-perturb:shrink=0.5,noise=0,every=4,head={head}", optimizer)
    train(net, optimizer, range(3))
    before, state = weights(net)[-2:], optimizer.state[net[-1].weight]
    moments = state["exp_avg"].clone()
    train(net, optimizer, range(3, 4), still=True)
    moved = [p.detach() for p in list(net.parameters())[-2:]]
    drift = max(float((2 * m - b).abs().max()) for m, b in zip(moved, before, strict=True))
    if head == "shrink":
        assert drift < 0.05  # momentum, and half
    elif head == "keep":
        assert all(float((m - b).abs().max()) < 0.05 for m, b in zip(moved, before, strict=True))
        assert state["exp_avg"].any()
    else:
        assert drift > 0.1
        assert not state["exp_avg"].any()
        assert int(state["step"]) == 0
        assert optimizer.state[net[0].weight]["exp_avg"].any()
    assert moments.any()


def test_dormancy_decides_how_much_is_left_per_copy() -> None:
    net = batched(2, Init("lecun-uniform"))
    with torch.no_grad():  # copy 0: no unit asleep; copy 1: 8 of 32
        net[0].bias.fill_(1.0)
        net[0].weight.mul_(0.01)
        net[2].bias.fill_(1.0)
        net[2].weight.mul_(0.01)
        net[0].bias[1, :8] = -1.0
    optimizer = BatchedAdam(net.parameters(), lr=0.0)
    put_to(net, "shrink-perturb:adapt=dormancy,shrink=0.9,every=1", optimizer)
    train(net, optimizer, range(1))
    # Biases are zero at birth: they only shrink, by 0.9 and by 1 - 2 * 8 / 32.
    expected = torch.tensor([[0.9], [0.5]], dtype=torch.float64).expand(2, 16)
    torch.testing.assert_close(net[2].bias.detach(), expected, rtol=1e-12, atol=0)
    size = net[0].weight[1].detach().abs().max()  # half of psi, and next to nothing of before
    assert 0.4 < float(size) < 0.51


@pytest.mark.parametrize(("scope", "changed"), [("weights", 1), ("layers", 2), ("all", 5)])
def test_norms_and_free_parameters_take_part_only_in_scope_all(scope: str, changed: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
            self.scale = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) * self.scale

    net = Net()
    with torch.no_grad():
        net.body[1].weight.fill_(3.0)
        net.body[1].bias.fill_(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    units = find_units(net, torch.zeros(2, 3))
    attach(f"shrink-perturb:shrink=0.5,noise=0.5,every=1,scope={scope},head=keep", units, optimizer)
    before = weights(net)
    with torch.no_grad():
        net.scale.fill_(4.0)
    optimizer.step()
    assert sum(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)) == (
        changed if scope == "all" else changed + 1
    )
    if scope == "all":  # half way to gain 1, offset 0 and the scale when attached
        assert net.body[1].weight.tolist() == [2.0] * 4
        assert net.body[1].bias.tolist() == [0.5] * 4
        assert net.scale.tolist() == [3.0]


def test_the_initial_weights_as_noise_are_a_pull() -> None:
    net = plain()
    start = weights(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    put_to(net, "shrink-perturb:shrink=0.5,noise=0.5,every=1,draw=initial", optimizer)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(8.0)
    optimizer.step()
    for p, q in zip(net.parameters(), start, strict=True):
        torch.testing.assert_close(p.detach(), q + 4.0, rtol=1e-12, atol=0)


def test_targets_shrink_too_with_noise_of_their_own() -> None:
    net, target = plain(0), plain(1)
    before = weights(net), weights(target)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    put_to(net, "shrink-perturb:shrink=0.5,noise=0.5,every=1", optimizer, targets=[target])
    optimizer.step()
    noise = [
        [2 * (p.detach() - 0.5 * q) for p, q in zip(n.parameters(), b, strict=True)]
        for n, b in zip((net, target), before, strict=True)
    ]
    for own, other, fan in zip(*noise, (3, 3, 16, 16, 16, 16), strict=True):
        assert not torch.equal(own, other)
        assert float(other.abs().max()) <= 1 / math.sqrt(fan) + 1e-12
        assert other.any()


def test_orthogonal_draws_are_spread_evenly_over_rotations() -> None:
    """First entries of many 3x3 draws: mean 0, variance 1/3, both signs of determinants."""
    net = batched(2000, Init("orthogonal"))
    square = nn.Sequential(net[0])  # 3 -> 16: columns orthonormal
    optimizer = BatchedAdam(square.parameters(), lr=0.0)
    units = find_units(square, torch.zeros(2000, 1, 3).double())
    attach("shrink-perturb:shrink=0,noise=1,every=1", units, optimizer)
    square(torch.zeros(2000, 1, 3).double()).sum().backward()
    optimizer.step()
    weight = square[0].weight.detach()
    assert float(weight.mean(0).abs().max()) < 4.5 * 0.25 / math.sqrt(2000)
    assert float(weight.var(0).max()) < 1.2 / 16
    assert float(weight.var(0).min()) > 0.8 / 16
