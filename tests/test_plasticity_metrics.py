"""Metrics against their oracles (each with the value worked out by hand)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from perennial.plasticity import BatchedConv2d, BatchedLinear, find_units, metrics, registry


def sigma(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "effective", "stable", "approximate"),
    [
        ((3.0, 1.0), 1.7548, 1.1111, 2),  # 9 of 10 is less than 99 %
        ((9.0, 1.0), math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)), 82 / 81, 2),
        ((10.0, 1.0), 1.3561, 1.01, 1),  # 100 of 101 is more than 99 %
        ((1.0, 1.0, 1.0, 1.0), 4.0, 4.0, 4),
        ((0.0, 0.0), 0.0, 0.0, 0),
    ],
)
def test_ranks_of_known_singular_values(
    values: tuple[float, ...], effective: float, stable: float, approximate: int
) -> None:
    s = sigma(*values)
    assert metrics.effective_rank(s).item() == pytest.approx(effective, abs=1e-4)
    assert metrics.stable_rank(s).item() == pytest.approx(stable, abs=1e-4)
    assert metrics.approximate_rank(s).item() == approximate


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (3, 30, 8)])
def test_singular_values_equal_an_svd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    ours = metrics.singular_values(x)
    torch.testing.assert_close(ours, torch.linalg.svdvals(x.double()), rtol=1e-10, atol=1e-9)


def test_rounding_does_not_count_as_rank() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 1) @ torch.randn(1, 64)
    values = metrics.singular_values(x.double())
    assert metrics.effective_rank(values).item() == pytest.approx(1.0, abs=1e-4)
    assert metrics.approximate_rank(values).item() == 1


def test_dormant_and_dead() -> None:
    size = torch.tensor([0.0, 1.0, 1.0, 2.0])
    for threshold in (0.0, 0.025, 0.1):
        assert metrics.dormant(size, threshold).tolist() == [True, False, False, False]
        assert metrics.dormant(100 * size, threshold).float().mean() == 0.25
    assert metrics.dormant(torch.tensor([0.02, 1.0, 1.0, 1.98]), 0.025).sum() == 1
    assert metrics.dormant(torch.tensor([0.02, 1.0, 1.0, 1.98]), 0.0).sum() == 0
    assert metrics.dormant(torch.zeros(3), 0.025).all() and metrics.dead(torch.zeros(3)).all()
    assert metrics.dead(size).tolist() == [True, False, False, False]


class Two(nn.Module):
    def __init__(self, copies: int) -> None:
        super().__init__()
        self.policy = nn.Sequential(
            BatchedLinear(copies, 3, 10), nn.ReLU(), BatchedLinear(copies, 10, 4), nn.ReLU(),
            BatchedLinear(copies, 4, 2),
        )  # fmt: skip
        self.value = nn.Sequential(
            BatchedLinear(copies, 3, 5), nn.Tanh(), BatchedLinear(copies, 5, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x), self.value(x)


def test_measure_per_layer_and_network_and_copy() -> None:
    torch.manual_seed(0)
    net = Two(2)
    units = find_units(net, torch.zeros(2, 1, 3))
    before = metrics.measure(units)
    assert "policy/weight_norm" in before and "policy/dead_fraction" not in before
    with torch.no_grad():
        net.policy[0].bias.fill_(1.0)
        net.policy[0].bias[1, :3] = -100.0  # copy 1: three of ten never active
        net.policy[2].bias.fill_(10.0)
    x = torch.randn(2, 64, 3)
    a, b = net(x)
    (a.sum() + b.sum()).backward()
    found = metrics.measure(units)
    assert all(v.shape == (2,) and v.dtype == torch.float64 for v in found.values())
    torch.testing.assert_close(found["policy/0/dead_fraction"], sigma(0.0, 0.3))
    torch.testing.assert_close(found["policy/0/dormant_fraction_0"], sigma(0.0, 0.3))
    torch.testing.assert_close(found["policy/dead_fraction"], sigma(0.0, 3 / 14))  # sum over sum
    assert found["value/dead_fraction"].tolist() == [0.0, 0.0]
    h = net.policy[3](net.policy[2](net.policy[1](net.policy[0](x)))).detach()
    for copy in range(2):
        values = torch.linalg.svdvals(h[copy].double())
        expected = metrics.effective_rank(values)
        torch.testing.assert_close(
            found["policy/1/effective_rank"][copy], expected, rtol=1e-5, atol=0
        )
    assert torch.equal(found["policy/1/effective_rank"], found["policy/effective_rank"])
    assert "policy/0/effective_rank" not in found
    assert "policy/0/effective_rank" in metrics.measure(units, ranks="all")
    assert not any("rank" in key for key in metrics.measure(units, ranks="none"))
    layers = [net.policy[i].weight.detach().double() for i in (0, 2, 4)]
    for i, w in enumerate(layers):
        expected = w.flatten(1).norm(dim=1)
        torch.testing.assert_close(found[f"policy/{i}/weight_norm"], expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            found[f"policy/{i}/weight_magnitude"], w.abs().flatten(1).mean(1), rtol=1e-6, atol=0
        )
    every = torch.cat([w.flatten(1) for w in layers], 1)
    torch.testing.assert_close(found["policy/weight_norm"], every.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        found["policy/weight_magnitude"], every.abs().mean(1), rtol=1e-6, atol=0
    )
    grads = torch.cat([net.value[i].weight.grad.flatten(1).double() for i in (0, 2)], 1)
    torch.testing.assert_close(found["value/gradient_norm"], grads.norm(dim=1), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="ranks='lats' is unknown"):
        metrics.measure(units, ranks="lats")


def test_convolutions_of_several_copies_are_measured_as_each_alone() -> None:
    """Batched, against torch's own layers with the weights of one copy."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 2, 9, 9)
    net = nn.Sequential(
        BatchedConv2d(2, 2, 4, 3), nn.ReLU(), BatchedConv2d(2, 4, 6, 3, stride=2), nn.ReLU(),
        nn.Flatten(2), BatchedLinear(2, 54, 8), nn.ReLU(), BatchedLinear(2, 8, 3),
    )  # fmt: skip
    with torch.no_grad():
        net[0].bias[1, :2] = -100.0  # copy 1: two of four channels are dead
    units = find_units(net, x[:, :1])
    net(x).square().sum().backward()
    together = metrics.measure(units)
    assert together["net/0/dead_fraction"].tolist() == [0.0, 0.5]
    for copy in range(2):
        alone = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip
        for mine, theirs in zip(alone.parameters(), net.parameters(), strict=True):
            mine.data.copy_(theirs.data[copy])
        units = find_units(alone, x[copy, :1])
        alone(x[copy]).square().sum().backward()
        expected = metrics.measure(units)
        assert expected.keys() == together.keys()
        for key, value in expected.items():
            assert float(together[key][copy]) == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_plain_models_give_floats_and_nothing_is_disturbed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    units = find_units(net, torch.zeros(1, 3))
    with torch.no_grad():
        net[0].weight.fill_(0.0)
        net[0].bias.copy_(torch.tensor([-1.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
        net[2].weight.fill_(-0.5)
    net(torch.randn(9, 3)).sum().backward()
    rng = torch.get_rng_state()
    found = metrics.measure(units)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(isinstance(value, float) for value in found.values())
    assert found["net/dead_fraction"] == pytest.approx(1 / 3)
    assert found["net/effective_rank"] == pytest.approx(1.0)
    assert found["net/1/weight_magnitude"] == 0.5
    assert found["net/1/weight_norm"] == pytest.approx(0.5 * math.sqrt(12))


def test_every_metric_is_described() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    units = find_units(net, torch.zeros(1, 3))
    net(torch.randn(9, 3)).sum().backward()
    names = {key.rpartition("/")[2] for key in metrics.measure(units)}
    assert names <= set(registry.METRICS)
