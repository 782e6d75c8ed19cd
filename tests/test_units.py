"""The probe's wiring against brute force: what a unit's weights really reach."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perennial.plasticity import BatchedConv2d, BatchedLinear, Init, attach, find_units
from perennial.plasticity.units import Site


class TwoNets(nn.Module):
    """Policy and value over S copies."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.policy = nn.Sequential(
            BatchedLinear(copies, 3, 6), nn.Tanh(), BatchedLinear(copies, 6, 5), nn.ReLU(),
            BatchedLinear(copies, 5, 2),
        )  # fmt: skip
        self.value = nn.Sequential(
            BatchedLinear(copies, 3, 4), nn.ReLU(), BatchedLinear(copies, 4, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x), self.value(x)


class Conv(nn.Module):
    """conv -> pool -> conv -> flatten -> linear, functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.conv2 = nn.Conv2d(4, 6, 2)
        self.fc = nn.Linear(6 * 3 * 3, 7)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x)).flatten(1)
        return self.out(F.relu(self.fc(x)))


class BatchedConvs(nn.Module):
    """Bytes -> conv -> conv -> flatten -> linear -> two heads, over S copies."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            BatchedConv2d(copies, 2, 4, 3, stride=2), nn.ReLU(),
            BatchedConv2d(copies, 4, 3, 2, padding=1), nn.ReLU(), nn.Flatten(2),
            BatchedLinear(copies, 3 * 5 * 5, 6), nn.ReLU(),
        )  # fmt: skip
        self.one, self.two = BatchedLinear(copies, 6, 2), BatchedLinear(copies, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.trunk(x.float() / 255)
        return self.one(z), self.two(z)


class CReLUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(torch.cat((x.relu(), (-x).relu()), -1))


class Critics(nn.Module):
    """Observation and action joined, a shared trunk, LayerNorm, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.head1, self.head2 = nn.Linear(7, 4), nn.Linear(7, 2)
        self.last = nn.Linear(4, 1)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.cat((action, self.norm(self.trunk(obs)).relu()), -1)
        return self.last(self.head1(z).relu()), self.head2(z)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(x + self.back(self.inner(x).relu()))


CASES: dict[str, tuple[Callable[[], nn.Module], object]] = {
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)
        ),
        torch.randn(4, 3),
    ),
    "conv": (Conv, torch.randn(3, 2, 10, 10)),
    "batched": (lambda: TwoNets(3), torch.randn(3, 4, 3)),
    "batched conv": (
        lambda: BatchedConvs(2),
        torch.randint(0, 256, (2, 3, 2, 9, 9), dtype=torch.uint8),
    ),
    "crelu": (CReLUNet, torch.randn(4, 3)),
    "critics": (Critics, (torch.randn(4, 3), torch.randn(4, 2))),
}


def call(model: nn.Module, example: object) -> list[Tensor]:
    out = model(*example) if isinstance(example, tuple) else model(example)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_incoming_and_outgoing_weights_by_perturbation(case: str) -> None:
    """Silencing unit i's columns hides any change of its row; no other unit's columns do."""
    torch.manual_seed(0)
    make, example = CASES[case]
    model = make()
    for module in model.modules():  # a norm couples units; take its coupling away, keep its gains
        if isinstance(module, nn.LayerNorm):
            module.forward = lambda x, m=module: x * m.weight + m.bias  # type: ignore[method-assign]
    units = find_units(model, example)
    start = copy.deepcopy(model.state_dict())
    checked = 0
    for site in units:
        assert not site.obstacle
        for i in range(site.n):
            for j in {i, (i + 1) % site.n}:
                model.load_state_dict(start)
                for consumer in site.consumers:
                    weight = consumer.layer.weight
                    weight[:, :, consumer.columns.table[j]] = 0.0
                before = call(model, example)
                site.producer.weight[:, i] = 3.0
                bias = site.producer.bias
                assert bias is not None
                bias[:, i] += 5.0
                same = all(
                    torch.equal(a, b) for a, b in zip(before, call(model, example), strict=True)
                )
                assert same == (i == j), f"{site.name}: row {i}, columns of {j}"
                checked += 1
    assert checked >= 8


def test_conv_to_linear_columns_are_contiguous_blocks_after_pooling() -> None:
    units = {site.name: site for site in find_units(Conv(), torch.zeros(1, 2, 10, 10))}
    table = units["conv2"].columns.table
    assert table.tolist() == [list(range(9 * c, 9 * c + 9)) for c in range(6)]
    assert units["conv1"].columns.k == 1 and units["fc"].columns.k == 1


def test_batched_convolutions_have_names_nets_and_the_wiring_of_ordinary_ones() -> None:
    sites = {s.name: s for s in find_units(BatchedConvs(2), torch.zeros(2, 1, 2, 9, 9))}
    assert [(s.key, s.n, s.columns.k) for s in sites.values()] == [
        ("trunk/0", 4, 1), ("trunk/1", 3, 25), ("trunk/2", 6, 1),
    ]  # fmt: skip
    table = sites["trunk.2"].columns.table
    assert table.tolist() == [list(range(25 * c, 25 * c + 25)) for c in range(3)]
    assert [c.layer.name for c in sites["trunk.5"].consumers] == ["one", "two"]
    assert all(s.nonnegative and s.nonlinearity == "relu" for s in sites.values())


def test_crelu_units_own_two_columns_and_heads_share_a_trunk() -> None:
    (site,) = find_units(CReLUNet(), torch.zeros(1, 3))
    assert site.columns.table.tolist() == [[i, i + 4] for i in range(4)]
    model = Critics()
    trunk, head = find_units(model, (torch.zeros(1, 3), torch.zeros(1, 2)))
    assert [c.layer.name for c in trunk.consumers] == ["head1", "head2"]
    assert trunk.columns.table.flatten().tolist() == [2, 3, 4, 5, 6]
    assert trunk.norms == [model.norm] and head.norms == []


def test_residual_streams_are_seen_and_inner_units_are_free() -> None:
    sites = {site.name: site for site in find_units(Residual(), torch.zeros(1, 3))}
    assert "residual" in sites["stem"].obstacle and "residual" in sites["back"].obstacle
    assert not sites["inner"].obstacle


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.normalize(self.fc1(x), dim=-1))


def test_mixing_is_an_error_that_names_the_pair_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"'fc1' mix before 'fc2'.*edges=.*skip=") as error:
        find_units(Mixer(), torch.ones(1, 3))
    assert "\n" not in str(error.value)
    assert len(find_units(Mixer(), torch.ones(1, 3), skip={"fc1"})) == 0
    table = torch.arange(4).view(4, 1)
    (site,) = find_units(Mixer(), torch.ones(1, 3), edges={("fc1", "fc2"): table})
    assert site.columns.table.equal(table)
    with pytest.raises(ValueError, match="no layer named 'fc9'"):
        find_units(Mixer(), torch.ones(1, 3), skip={"fc9"})
    with pytest.raises(ValueError, match="no Linear"):
        find_units(nn.ReLU(), torch.ones(1, 3))


class Split(nn.Module):
    """Half of the units feed one layer, half another: no common table."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.a, self.b = nn.Linear(3, 300), nn.Linear(150, 2), nn.Linear(150, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.fc(x).relu().chunk(2, -1)
        return self.a(left), self.b(right)


def test_units_that_only_partly_reach_a_layer_are_an_error() -> None:
    with pytest.raises(ValueError, match="'fc' mix before 'a'"):
        find_units(Split(), torch.ones(1, 3))


def test_the_probe_disturbs_nothing() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)
            self.drop, self.fc2 = nn.Dropout(0.5), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(self.bn(self.fc1(x)).relu()) + 0 * torch.randn(1)
            y = self.fc2(x)
            return torch.distributions.Normal(y, y.exp()).rsample()

    model = Noisy()
    model.drop.eval()
    model(torch.randn(8, 3)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    rng, checks = torch.get_rng_state(), torch.distributions.Distribution._validate_args
    (site,) = find_units(model, torch.zeros(1, 3))
    assert site.norms == [model.bn]
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert [m.training for m in (model, model.bn, model.drop)] == [True, True, False]
    assert len(model.fc1._forward_hooks) == 0
    assert torch.distributions.Distribution._validate_args is checks


def test_activations_of_training_forwards_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    units = find_units(model, torch.zeros(1, 3))
    (site,) = units
    with pytest.raises(ValueError, match="no activations of '0' yet"):
        _ = site.activation
    x = torch.randn(6, 3)
    model(x)
    expected = model[0](x).relu().detach()
    assert torch.equal(site.activation[0], expected) and not site.activation.requires_grad
    with torch.no_grad():
        model(x + 1)
    assert torch.equal(site.activation[0], expected)
    with torch.no_grad(), units.recording():
        model(x + 1)
    assert not torch.equal(site.activation[0], expected)
    units.record(model[2], x.new_ones(2, 4))
    assert site.activation.shape == (1, 2, 4)
    target = copy.deepcopy(model)
    target(x)
    assert site.activation.shape == (1, 2, 4), "a copied network must not record"
    units.close()
    model(x)
    assert site.activation.shape == (1, 2, 4)


def test_convolution_activations_have_one_row_per_position() -> None:
    model = Conv()
    units = {site.name: site for site in find_units(model, torch.zeros(1, 2, 10, 10))}
    x = torch.randn(3, 2, 10, 10)
    model(x)
    h1 = F.max_pool2d(F.relu(model.conv1(x)), 2)
    h2 = F.relu(model.conv2(h1))
    for name, h in (("conv1", h1), ("conv2", h2)):
        activation = units[name].activation
        assert activation.shape == (1, h.numel() // h.shape[1], h.shape[1])
        torch.testing.assert_close(activation.mean(1)[0], h.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("middle", "expected"), [(nn.ReLU(), True), (nn.Tanh(), False), (nn.Sigmoid(), True)]
)
def test_nonnegative_activations_are_recognised(middle: nn.Module, expected: bool) -> None:
    (site,) = find_units(nn.Sequential(nn.Linear(2, 3), middle, nn.Linear(3, 1)), torch.zeros(1, 2))
    assert site.nonnegative is expected


def test_a_shift_after_relu_is_not_nonnegative() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.relu, self.b = nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.relu(self.a(x)).sub_(1.0))

    (site,) = find_units(Shifted(), torch.zeros(1, 2))
    assert site.nonnegative is False


def test_keys() -> None:
    def keys(model: nn.Module, example: object) -> list[str]:
        return [site.key for site in find_units(model, example)]

    assert keys(TwoNets(2), torch.zeros(2, 1, 3)) == ["policy/0", "policy/1", "value/0"]
    assert keys(CASES["linear"][0](), torch.zeros(1, 3)) == ["net/0", "net/1"]

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.extractor = nn.ModuleDict({"pi": nn.Sequential(nn.Linear(3, 4), nn.ReLU())})
            self.action = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.action(self.extractor["pi"](x))

    assert keys(Deep(), torch.zeros(1, 3)) == ["pi/0"]


def test_outgoing_magnitude_averages_over_all_consumers() -> None:
    model = Critics()
    trunk = find_units(model, (torch.zeros(1, 3), torch.zeros(1, 2))).sites[0]
    every = torch.cat((model.head1.weight[:, 2:], model.head2.weight[:, 2:])).abs().mean(0)
    torch.testing.assert_close(trunk.outgoing()[0, :, 0], every)
    torch.testing.assert_close(trunk.incoming()[0], model.trunk.weight.abs().mean(1))


def test_only_units_of_the_optimizer_are_acted_on() -> None:
    model = TwoNets(1)
    units = find_units(model, torch.zeros(1, 1, 3))
    handle = attach("cbp", units, torch.optim.Adam(model.value.parameters()))
    assert [site.key for site in handle.units] == ["value/0"]
    model(torch.randn(1, 4, 3))
    assert handle.units.sites[0].activation.shape == (1, 4, 4)
    with pytest.raises(ValueError, match="cbp finds no units to replace"):
        attach("cbp", units, torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))


def test_layers_keep_how_they_were_drawn() -> None:
    site: Site = find_units(TwoNets(2), torch.zeros(2, 1, 3)).sites[0]
    assert site.producer.init == Init("torch-default")
    plain = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    (other,) = find_units(plain, torch.zeros(1, 2))
    assert other.producer.init == Init("torch-default", bias="torch-default")
    plain[0].init = Init("orthogonal", 2.0)  # type: ignore[assignment]
    assert other.producer.init.gain == 2.0
