"""Methods that change networks: what their layers compute, wiring, recycling, what does not fit."""

import copy
import math

import pytest
import stable_baselines3
import torch
from torch import nn

from perennial.plasticity import BatchedLinear, Init, attach, find_units, metrics, rewrite
from perennial.plasticity.norms import BatchedLayerNorm
from perennial.plasticity.paired import CReLU, SinCos
from perennial.plasticity.simba import ResidualBlock, SphereBlock, SphereStem, UnitSphere
from perennial.plasticity.units import CONVOLUTIONS

ALL = ["layer-norm", "crelu", "fourier", "nap", "simba", "simba:version=2"]


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def mlp(n=16, activation=nn.ReLU, head=True):
    torch.manual_seed(0)
    layers = [nn.Linear(5, n), activation(), nn.Linear(n, n), activation()]
    return nn.Sequential(*layers, *([nn.Linear(n, 3)] if head else []))


def batched(seeds=(0, 1, 2), n=16):
    generators, init = streams(*seeds), Init("orthogonal", 2**0.5)
    sizes = ((5, n), (n, n), (n, 3))
    layers = [
        BatchedLinear(len(seeds), a, b, init=init, generators=generators, dtype=torch.float64)
        for a, b in sizes
    ]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), generators


def cnn():
    torch.manual_seed(0)
    convs = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convs, nn.Linear(4 * 9, 8), nn.ReLU(), nn.Linear(8, 2))


IMAGE = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(1))

# ---- what the layers compute -------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_batched_layer_norm_is_a_layer_norm_per_copy(copies, affine):
    torch.manual_seed(0)
    ours = BatchedLayerNorm(copies, 6, affine=affine, dtype=torch.float64)
    x = torch.randn(copies, 9, 6).double().requires_grad_()
    if affine:
        ours.weight.data.normal_()
        ours.bias.data.normal_()
    out, gradient = ours(x), torch.randn(copies, 9, 6).double()
    out.backward(gradient)
    for s in range(copies):
        theirs = nn.LayerNorm(6, elementwise_affine=affine).double()
        if affine:
            theirs.load_state_dict({k: v[s] for k, v in ours.state_dict().items()})
        y = x[s].detach().requires_grad_()
        expected = theirs(y)
        expected.backward(gradient[s])
        assert torch.allclose(out[s], expected, atol=1e-13)
        assert torch.allclose(x.grad[s], y.grad, atol=1e-13)
        if affine:
            assert torch.allclose(ours.weight.grad[s], theirs.weight.grad, atol=1e-13)
            assert torch.allclose(ours.bias.grad[s], theirs.bias.grad, atol=1e-13)


def test_layer_norm_knows_no_scale():
    norm = BatchedLayerNorm(2, 8, eps=1e-20, dtype=torch.float64)
    x = torch.randn(2, 5, 8).double()
    assert torch.allclose(norm(x), norm(37.0 * x), atol=1e-10)
    assert not torch.allclose(norm(x), norm(-x), atol=1e-2)


def test_crelu_halves():
    x = torch.randn(7, 5)
    up, down = CReLU()(x).chunk(2, -1)
    assert torch.equal(up + down, x.abs())
    assert torch.equal(up - down, x)
    assert (up * down == 0).all()
    assert torch.equal(CReLU(-3)(IMAGE), torch.cat([IMAGE.relu(), (-IMAGE).relu()], 1))


def test_fourier_pairs():
    x = (5 * torch.randn(7, 6)).double().requires_grad_()
    out = SinCos()(x)
    sin, cos = out.chunk(2, -1)
    assert torch.allclose(sin**2 + cos**2, torch.ones(7, 6).double(), atol=1e-14)
    assert torch.allclose(out.norm(dim=-1), torch.full((7,), math.sqrt(6)).double(), atol=1e-14)
    slopes = torch.autograd.functional.jacobian(lambda z: SinCos()(z), x[0].detach())
    assert torch.allclose(slopes.norm(dim=0), torch.ones(6).double(), atol=1e-14)  # of each pair


def test_simba_block_without_its_second_layer_is_identity():
    net = rewrite(mlp(), "simba:blocks=2")
    x = torch.randn(9, 16)
    blocks = [m for m in net if isinstance(m, ResidualBlock)]
    assert len(blocks) == 2 and blocks[0].up.weight.shape == (64, 16)
    assert not torch.equal(blocks[0](x), x)
    nn.init.zeros_(blocks[0].down.weight)
    assert torch.equal(blocks[0](x), x)  # its bias is zero from the start


def test_simba_reads_as_the_paper():
    net = rewrite(mlp(), "simba")
    kinds = [type(m) for m in net]
    assert kinds == [nn.Linear, ResidualBlock, nn.LayerNorm, nn.Linear]
    x = torch.randn(9, 5)
    stem, block, _, head = net
    h = stem(x)
    branch = block.down(torch.relu(block.up(nn.functional.layer_norm(h, (16,)))))
    expected = head(nn.functional.layer_norm(h + branch, (16,)))
    assert torch.allclose(net(x), expected, atol=1e-6)
    stacked = stem.weight.T @ stem.weight
    assert torch.allclose(stacked, torch.eye(5), atol=1e-5)  # orthogonal, gain 1
    assert abs(block.up.weight.std().item() / math.sqrt(2 / 16) - 1) < 0.1  # He's variance


def test_simba_2_lives_on_the_sphere():
    net, generators = batched()
    rewrite(net, "simba:version=2,blocks=3", generators=generators)
    assert [type(m) for m in net[:-1]] == [SphereStem, *[SphereBlock] * 3]
    x = 100 * torch.randn(3, 7, 5).double()
    h = net[0](x)
    for block in net[1:-1]:
        weights = block.up.weight, block.down.weight
        assert all(torch.allclose(w.norm(dim=-1), torch.ones(1).double()) for w in weights)
        assert block.up.bias is None and block.down.bias is None
        step = UnitSphere()(block.down(torch.relu(block.scaler(block.up(h)))))
        blend = torch.lerp(h, step, 1 / 4)  # 1 / (blocks + 1) at first
        h = block(h)
        assert torch.allclose(h, blend / blend.norm(dim=-1, keepdim=True), atol=1e-12)
        assert torch.allclose(h.norm(dim=-1), torch.ones(1).double())
    scale = net[1].scaler.weight * net[1].scaler.factor
    assert torch.allclose(scale, torch.tensor(math.sqrt(2 / 16) / 2).double())


# ---- what rewriting leaves alone ---------------------------------------------------------------


def test_layer_norm_keeps_the_weights_and_stands_before_the_nonlinearity():
    net = mlp()
    before = copy.deepcopy(net)
    assert rewrite(net, ["layer-norm", "cbp"]) is net
    kinds = [type(m).__name__ for m in net]
    assert kinds == ["Linear", "LayerNorm", "ReLU", "Linear", "LayerNorm", "ReLU", "Linear"]
    linear = [m for m in net if isinstance(m, nn.Linear)]
    for ours, old in zip(linear, [before[0], before[2], before[4]], strict=True):
        assert torch.equal(ours.weight, old.weight) and torch.equal(ours.bias, old.bias)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("head", [True, False])
def test_widths_at_both_ends_stay(method, head):
    net = rewrite(mlp(head=head), method)
    assert net(torch.randn(4, 5)).shape == (4, 3 if head else 16)


@pytest.mark.parametrize("method", [m for m in ALL if m != "simba:version=2"])
def test_convolutional_networks(method):
    net = rewrite(cnn(), method)
    assert net(IMAGE).shape == (3, 2)
    channels = [m.out_channels for m in net if isinstance(m, nn.Conv2d)]
    assert channels == ([3, 2] if method in ("crelu", "fourier") else [6, 4])
    norms = [m for m in net if isinstance(m, nn.GroupNorm)]
    assert len(norms) == (2 if method in ("layer-norm", "nap") else 0)
    for norm in norms:
        assert norm.num_groups == 1


@pytest.mark.parametrize("method", [*ALL, "crelu:width=keep"])
def test_a_copy_does_not_feel_its_company(method):
    together, generators = batched((5, 7, 9))
    rewrite(together, method, generators=generators)
    alone, generators = batched((7,))
    rewrite(alone, method, generators=generators)
    names = dict(together.named_parameters())
    for name, p in alone.named_parameters():
        assert torch.equal(p[0], names[name][1]), name
    x = torch.randn(1, 4, 5).double()
    assert torch.allclose(alone(x)[0], together(x.expand(3, -1, -1))[1], atol=1e-12)


def test_crelu_keep_doubles_the_readers():
    net, generators = batched()
    rewrite(net, "crelu:width=keep", generators=generators)
    assert [tuple(m.weight.shape) for m in net if isinstance(m, BatchedLinear)] == [
        (3, 16, 5),
        (3, 16, 32),
        (3, 3, 32),
    ]
    stock = rewrite(cnn(), "fourier:width=keep")
    assert stock(IMAGE).shape == (3, 2)
    assert [m.in_channels for m in stock if isinstance(m, nn.Conv2d)] == [2, 12]


def test_crelu_preserves_energy_under_he():
    """He's variance on the actual fan-in keeps the mean square of pre-activations."""
    init, generators = Init("kaiming-uniform", 2**0.5), streams(0)
    layers = [BatchedLinear(1, 256, 256, init=init, generators=generators) for _ in range(3)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    rewrite(net, "crelu", generators=generators)
    x = torch.randn(1, 512, 256, generator=generators[0])
    first = net[0](x).square().mean()
    second = net[2](net[1](net[0](x))).square().mean()
    assert abs(first / 2 - 1) < 0.1 and abs(second / first - 1) < 0.15


def test_sb3_networks_and_aliases():
    model = stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", device="cpu", n_steps=8, batch_size=8)
    rewrite(model.policy, ["crelu", "layer-norm"])
    x = torch.randn(4, 3)
    assert model.policy(x)[0].shape == (4, 1)
    net = model.policy.mlp_extractor.value_net
    assert [type(m).__name__ for m in net] == ["Linear", "LayerNorm", "CReLU"] * 2
    assert net[0].out_features == 32 and net[1].normalized_shape == (32,)
    model = stable_baselines3.SAC("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=10)
    rewrite(model.critic, "layer-norm")
    assert model.critic.q_networks[0] is model.critic.qf0
    assert isinstance(model.critic.q_networks[0][1], nn.LayerNorm)


def test_rewritten_networks_are_copied_and_loaded():
    net, generators = batched()
    rewrite(net, ["crelu", "nap"], generators=generators)
    other = copy.deepcopy(net)
    for p in other.parameters():
        p.data.add_(1.0)
    other.load_state_dict(net.state_dict())
    x = torch.randn(3, 4, 5).double()
    assert torch.equal(net(x), other(x))
    find_units(other, x)  # and the copy counts as rewritten
    attach("nap", find_units(other, x), torch.optim.Adam(other.parameters()))


# ---- units of rewritten networks ---------------------------------------------------------------


def reached(net, producer, x):
    """Input features of the next weighted layer that each unit moves: brute force, bool [n, in]."""
    place = next(k for k, m in enumerate(net) if m is producer)
    start = place + 1
    while start < len(net) and getattr(net[start], "normalizes_units", False):
        start += 1
    readers = (nn.Linear, BatchedLinear, *CONVOLUTIONS)
    end = next(k for k in range(place + 1, len(net)) if isinstance(net[k], readers))
    h = net[: place + 1](x)
    base = net[place + 1 : end](h)
    axis = 1 if isinstance(producer, CONVOLUTIONS) else -1
    rows = []
    for unit in range(h.shape[axis]):
        moved = h.clone()
        moved.select(axis, unit).mul_(-1.3).add_(0.7)
        changed = net[place + 1 : end](moved) != base
        rows.append(changed.flatten(2).any(-1).any(0) if changed.ndim > 2 else changed.any(0))
    return torch.stack(rows)


@pytest.mark.parametrize("method", ["crelu", "fourier"])
def test_columns_of_pairs_by_perturbation(method):
    net = rewrite(cnn(), method)
    units = find_units(net, IMAGE)
    assert [site.n for site in units] == [3, 2, 4]
    for site in units:
        table = site.columns.table
        expected = reached(net, site.producer.module, IMAGE)
        found = torch.zeros_like(expected)
        found[torch.arange(site.n)[:, None], table] = True
        assert torch.equal(found, expected)
        assert not site.obstacle
    assert [site.columns.k for site in units] == [2, 2 * 9, 2]


@pytest.mark.parametrize("kind", ["stock", "batched"])
@pytest.mark.parametrize("method", ALL)
def test_find_units_understands(method, kind):
    if kind == "stock":
        net, x = rewrite(mlp(), method), torch.zeros(1, 5)
    else:
        net, generators = batched()
        net, x = rewrite(net, method, generators=generators), torch.zeros(3, 1, 5).double()
    units = find_units(net, x)
    free = [site for site in units if not site.obstacle]
    if method.startswith("simba"):
        assert len(units) == 3 and [site.n for site in free] == [64]  # inside the block alone
        return
    assert len(free) == len(units) == 2
    paired = method in ("crelu", "fourier")
    assert [(site.n, site.columns.k) for site in free] == [(8, 2) if paired else (16, 1)] * 2
    assert [len(site.norms) for site in free] == [int(method in ("layer-norm", "nap"))] * 2


def test_find_units_sees_that_crelu_is_not_negative():
    units = find_units(rewrite(mlp(), "crelu"), torch.zeros(1, 5))
    assert all(site.nonnegative for site in units)
    units = find_units(rewrite(mlp(), "fourier"), torch.zeros(1, 5))
    assert not any(site.nonnegative for site in units)


def test_a_dead_half_is_no_dead_unit():
    net = rewrite(mlp(), "crelu")
    units = find_units(net, torch.zeros(1, 5))
    nn.init.constant_(net[0].bias, -100.0)  # relu(x) is zero for every unit
    net(torch.randn(32, 5))
    site = units.sites[0]
    assert (site.raw[:, :8] == 0).all() and (site.raw == 0).float().mean() >= 0.5
    found = metrics.measure(units)
    assert found["net/0/dead_fraction"] == found["net/0/dormant_fraction"] == 0
    assert site.activation.shape == (1, 64, 8)


@pytest.mark.parametrize("kind", ["stock", "batched"])
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("recycler", ["cbp:rate=0.5,maturity=1", "redo:threshold=0.9,every=2"])
def test_recycling_works_on_rewritten_networks(method, kind, recycler):
    torch.manual_seed(0)
    if kind == "stock":
        net, x = rewrite(mlp(), method), torch.randn(32, 5)
    else:
        net, generators = batched()
        net = rewrite(net, method, generators=generators)
        x = torch.randn(3, 32, 5).double()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    units = find_units(net, x)
    handle = attach([method, recycler], units, optimizer)
    seen = []
    for site in units:
        seen.append(site.producer.weight.clone())
    for _ in range(6):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    (count,) = handle.counts().values()
    if (method, recycler[:4]) != ("fourier", "redo"):  # its units are about equally active
        assert (count > 0).all()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("method, features", [("layer-norm", 1), ("crelu", 2), ("fourier", 2)])
def test_recycled_units_fall_silent_in_both_columns(method, features):
    net, generators = batched()
    net = rewrite(net, method, generators=generators)
    x = torch.randn(3, 32, 5).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.0)
    units = find_units(net, x)
    if method == "layer-norm":
        net[1].weight.data.fill_(1.5)
        net[1].bias.data.fill_(0.5)
    before = [site.producer.weight.clone() for site in units]
    handle = attach("cbp:rate=0.25,maturity=0,count=accumulate", units, optimizer)
    net(x).square().mean().backward()
    optimizer.step()
    n = units.sites[0].n
    assert handle.counts()["cbp"].tolist() == [2 * n // 4] * 3
    for site, old in zip(units, before, strict=True):
        new = (site.producer.weight != old).any(-1)
        if site is units.sites[1]:  # columns of the first layer's units were silenced as well
            continue
        assert new.sum(-1).tolist() == [n // 4] * 3
        silent = (site.consumers[0].layer.weight == 0).all(1)
        assert torch.equal(silent, new.repeat(1, features))
    if method == "layer-norm":
        gone = (units.sites[0].producer.weight != before[0]).any(-1)
        assert torch.equal(net[1].weight == 1.0, gone) and torch.equal(net[1].bias == 0.0, gone)


def test_ranks_and_dormancy_are_measured_everywhere():
    for method in ALL:
        net = rewrite(mlp(), method)
        units = find_units(net, torch.zeros(1, 5))
        net(torch.randn(64, 5))
        found = metrics.measure(units)
        assert all(math.isfinite(value) for value in found.values()), method
        assert found["net/effective_rank"] > 1
