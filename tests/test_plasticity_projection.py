"""Weights held at a norm: nap, weight-norm, and the unit rows of simba's second version."""

import copy

import pytest
import torch
from torch import nn

from perennial.plasticity import BatchedAdam, BatchedLinear, Init, attach, find_units, rewrite
from perennial.plasticity.norms import BatchedLayerNorm
from perennial.plasticity.projection import norm_of, project


def network(copies=3, n=16):
    generators = [torch.Generator().manual_seed(seed) for seed in range(copies)]
    init = Init("orthogonal", 2**0.5)
    layers = [
        BatchedLinear(copies, a, b, init=init, generators=generators, dtype=torch.float64)
        for a, b in ((5, n), (n, n), (n, 3))
    ]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    return net, generators


def exact(net):
    """Layer norms without the epsilon that breaks scale invariance."""
    for module in net:
        if isinstance(module, BatchedLayerNorm):
            module.eps = 1e-30
    return net


def batch(copies=3, rows=32):
    return torch.randn(copies, rows, 5, generator=torch.Generator().manual_seed(9)).double()


def train(net, methods, steps=20, every=None, active=None, lr=1e-2, targets=()):
    x = batch(net[-1].weight.shape[0])
    optimizer = BatchedAdam(net.parameters(), lr=lr)
    units = find_units(net, x)
    handle = attach(methods, units, optimizer, hooks=False, targets=targets)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - x[..., :3]).square().mean((1, 2)).sum().backward()
        handle.before_step(active=active)
        optimizer.step(active=active)
        handle.after_step(active=active)
        if every is not None:
            every()
    return handle


def hidden(net):
    return [m for m in net if isinstance(m, BatchedLinear)][:-1]


# ---- nap ---------------------------------------------------------------------------------------


def test_gradient_is_orthogonal_to_weights_before_a_norm():
    net, generators = network()
    net = exact(rewrite(net, "nap", generators=generators))
    net(batch()).square().sum().backward()
    for layer in hidden(net):
        assert layer.bias is None
        inner = (layer.weight * layer.weight.grad).sum((1, 2))
        assert (inner.abs() < 1e-9 * layer.weight.grad.abs().sum((1, 2))).all()


def test_gradient_falls_as_weights_grow():
    net, generators = network()
    net = exact(rewrite(net, "nap", generators=generators))
    net(batch()).square().sum().backward()
    gradient = hidden(net)[0].weight.grad.clone()
    net.zero_grad()
    hidden(net)[0].weight.data.mul_(4.0)
    net(batch()).square().sum().backward()
    assert torch.allclose(hidden(net)[0].weight.grad, gradient / 4.0, rtol=1e-9, atol=1e-12)


def test_projection_changes_no_output_and_is_idempotent():
    net, generators = network()
    net = exact(rewrite(net, "nap", generators=generators))
    radii = [norm_of(layer.weight.detach(), 1) for layer in hidden(net)]
    for layer in hidden(net):
        layer.weight.data.mul_(torch.tensor([0.3, 7.0, 1.0]).double().view(3, 1, 1))
    before = net(batch()).detach()
    due = torch.ones(3, dtype=torch.bool)
    for layer, radius in zip(hidden(net), radii, strict=True):
        project([layer.weight.data], radius.unsqueeze(-1), due, 1)
        assert torch.allclose(norm_of(layer.weight, 1), radius, rtol=1e-14)
        once = layer.weight.detach().clone()
        project([layer.weight.data], radius.unsqueeze(-1), due, 1)
        assert torch.allclose(layer.weight, once, rtol=1e-15)
    assert torch.allclose(net(batch()), before, atol=1e-12)


def test_nap_holds_hidden_norms_and_leaves_the_output_layer():
    net, generators = network()
    rewrite(net, "nap", generators=generators)
    radii = [norm_of(layer.weight.detach(), 1) for layer in hidden(net)]
    free, old = copy.deepcopy(net), net[-1].weight.detach().clone()
    train(net, "nap:gains=fixed", steps=1)
    train(free, [], steps=1)
    for layer, radius in zip(hidden(net), radii, strict=True):
        assert torch.allclose(norm_of(layer.weight, 1), radius, rtol=1e-13)
    assert not torch.allclose(norm_of(hidden(free)[0].weight, 1), radii[0], rtol=1e-4)
    # The first step is the same one, then projected; the output layer's is left as it was.
    for ours, plain in zip(hidden(net), hidden(free), strict=True):
        direction = plain.weight / norm_of(plain.weight, 1).view(-1, 1, 1)
        assert torch.allclose(ours.weight / norm_of(ours.weight, 1).view(-1, 1, 1), direction)
    assert torch.equal(net[-1].weight, free[-1].weight)
    assert not torch.equal(net[-1].weight, old)


def test_nap_without_projections_is_only_norms():
    net, generators = network()
    rewrite(net, "nap", generators=generators)
    plain = copy.deepcopy(net)
    state = torch.random.get_rng_state()
    train(net, "nap:every=0")
    train(plain, [])
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nap_every_so_many_steps():
    net, generators = network()
    rewrite(net, "nap", generators=generators)
    radius = norm_of(net[0].weight.detach(), 1)
    held = []
    train(
        net,
        "nap:every=3",
        steps=7,
        every=lambda: held.append(torch.allclose(norm_of(net[0].weight, 1), radius, rtol=1e-12)),
    )
    assert held == [False, False, True, False, False, True, False]


def test_gains_are_pulled_projected_or_absent():
    net, generators = network()
    rewrite(net, "nap", generators=generators)
    net[1].weight.data.fill_(3.0)
    net[1].bias.data.fill_(-1.0)
    train(net, "nap:decay=0.25", steps=1, lr=0.0)
    assert torch.allclose(net[1].weight, torch.tensor(2.5).double())
    assert torch.allclose(net[1].bias, torch.tensor(-0.75).double())

    net, generators = network()
    rewrite(net, "nap:gains=project", generators=generators)
    train(net, "nap:gains=project")
    for norm in (net[1], net[4]):
        squares = norm.weight.square().sum(-1) + norm.bias.square().sum(-1)
        assert torch.allclose(squares, torch.tensor(16.0).double())
        assert norm.bias.abs().max() > 1e-3

    net, generators = network()
    rewrite(net, "nap:gains=fixed", generators=generators)
    assert net[1].weight is None and len(list(net.parameters())) == 4


def test_copies_that_stand_still_stay_bit_for_bit():
    for name in ("nap", "weight-norm", "simba:version=2"):
        net, generators = network()
        rewrite(net, name, generators=generators)
        before = copy.deepcopy(net)
        train(net, name, steps=2, active=[True, False, True])
        for a, b in zip(net.parameters(), before.parameters(), strict=True):
            assert torch.equal(a[1], b[1])
            assert not torch.equal(a[0], b[0])


def test_targets_are_projected():
    net, generators = network()
    rewrite(net, "nap", generators=generators)
    target = copy.deepcopy(net)
    radius = norm_of(net[0].weight.detach(), 1)
    target[0].weight.data.mul_(0.9)
    head = target[-1].weight.data.mul_(0.9).clone()
    train(net, "nap", steps=1, targets=[target])
    assert torch.allclose(norm_of(target[0].weight, 1), radius)
    assert torch.equal(target[-1].weight, head)


def test_rows_of_simba_targets_stay_unit_vectors():
    net, generators = network()
    rewrite(net, "simba:version=2", generators=generators)
    target = copy.deepcopy(net)
    rows = [m.weight for m in target.modules() if getattr(m, "unit_rows", False)]
    head = [p.detach().clone() for p in target[-1].parameters()]
    assert len(rows) > 2
    for weight in rows:  # an average of unit vectors
        weight.data.mul_(0.9)
    train(net, "simba:version=2", steps=1, active=[True, False, True], targets=[target])
    for weight in rows:
        norm = norm_of(weight.detach(), 2)
        assert torch.allclose(norm[::2], torch.ones_like(norm[::2]))
        assert torch.allclose(norm[1], torch.full_like(norm[1], 0.9))
    assert all(torch.equal(a, b) for a, b in zip(head, target[-1].parameters(), strict=True))


def test_radii_are_state():
    net, generators = network()
    rewrite(net, "nap", generators=generators)
    handle = train(net, ["nap", "weight-norm"], steps=1)
    state = handle.state_of(2)
    assert state["nap.radius"].shape == (2,) and state["weight-norm.radius"].shape == (2,)
    handle.interventions["nap"].radius.mul_(2.0)
    handle.load_state_of(2, state)
    assert torch.allclose(
        norm_of(net[0].weight.detach(), 1)[2], handle.interventions["nap"].radius[2, 0]
    )


# ---- weight-norm -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["hidden", "all"])
@pytest.mark.parametrize("per", ["layer", "unit"])
def test_weight_norm_holds(per, scope):
    net, _ = network()
    axes = 2 if per == "unit" else 1
    layers = [m for m in net if isinstance(m, BatchedLinear)]
    before = [norm_of(layer.weight.detach(), axes) for layer in layers]
    train(net, f"weight-norm:per={per},scope={scope},scale=0.5")
    after = [norm_of(layer.weight, axes) for layer in layers]
    for k in range(2 if scope == "hidden" else 3):
        assert torch.allclose(after[k], before[k] / 2, rtol=1e-13)
    if scope == "hidden":
        assert not torch.allclose(after[2], before[2], rtol=1e-3)


def test_weight_norm_on_stock_layers_equals_the_formula():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    plain, x = copy.deepcopy(net), torch.randn(5, 2, 4, 4)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (net, plain)]
    radius = net[0].weight.detach().norm()
    attach("weight-norm", find_units(net, x), optimizers[0])
    for n, optimizer in zip((net, plain), optimizers, strict=True):
        n(x).square().mean().backward()
        optimizer.step()
    expected = plain[0].weight * radius / plain[0].weight.norm()
    assert torch.allclose(net[0].weight, expected, rtol=1e-6)
    assert torch.equal(net[0].bias, plain[0].bias) and torch.equal(net[3].weight, plain[3].weight)


def test_weight_norm_never_is_identity():
    net, _ = network()
    plain = copy.deepcopy(net)
    train(net, "weight-norm:every=0")
    train(plain, [])
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_zero_tensors_stay():
    weight = torch.zeros(2, 3, 4)
    project([weight], torch.ones(2, 1), torch.ones(2, dtype=torch.bool), 1)
    assert torch.equal(weight, torch.zeros(2, 3, 4))
    weight = torch.ones(2, 3, 4)  # that was zero at first
    project([weight], torch.zeros(2, 1), torch.ones(2, dtype=torch.bool), 1)
    assert torch.equal(weight, torch.ones(2, 3, 4))


# ---- simba 2 -----------------------------------------------------------------------------------


def test_simba_2_has_unit_rows_after_each_step():
    net, generators = network()
    rewrite(net, "simba:version=2", generators=generators)
    weights = [net[0].linear.weight, net[1].up.weight, net[1].down.weight]
    head = net[2].weight.detach().clone()

    def unit_rows():
        for weight in weights:
            assert torch.allclose(weight.norm(dim=-1), torch.ones(1).double(), rtol=1e-13)

    unit_rows()
    train(net, "simba:version=2", every=unit_rows)
    assert not torch.allclose(net[2].weight.norm(dim=-1), head.norm(dim=-1), rtol=1e-3)


def test_simba_2_forgives_a_later_initialisation():
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    rewrite(net, "simba:version=2")
    nn.init.orthogonal_(net[1].up.weight, 2**0.5)  # as SB3's policies do at the end of their build
    units = find_units(net, torch.zeros(1, 5))
    attach("simba:version=2", units, torch.optim.Adam(net.parameters()))
    assert torch.allclose(net[1].up.weight.norm(dim=-1), torch.ones(64))
