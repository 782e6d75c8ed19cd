"""Metrics of single units, distances and gradients, each against numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perennial.plasticity import BatchedLinear, find_units, metrics, registry


def sigma(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "srank", "participation"),
    [((3.0, 1.0), 2, 1.2195), ((99.5, 0.5), 1, 1.00005), ((1.0, 1.0, 1.0), 3, 3.0), ((0.0,), 0, 0)],
)
def test_srank_and_participation_ratio(
    values: tuple[float, ...], srank: int, participation: float
) -> None:
    assert metrics.srank(sigma(*values)).item() == srank
    assert metrics.participation_ratio(sigma(*values)).item() == pytest.approx(participation, 1e-4)


def test_feature_rank_counts_singular_values_of_scaled_features() -> None:
    features = torch.eye(50)  # all singular values 1 / sqrt(50) once scaled
    values = metrics.singular_values(features)
    assert metrics.feature_rank(values, 50).item() == 50
    assert metrics.feature_rank(values, 50, threshold=0.15).item() == 0
    assert metrics.feature_rank(0.01 * values, 50).item() == 0  # it depends on scale


def test_saturated() -> None:
    rows = torch.linspace(-1, 1, 200).unsqueeze(-1)
    relu = torch.cat((rows - 2, rows + 0.97, rows - 0.985, rows - 0.9), 1).relu()
    assert metrics.saturated(relu, "relu").tolist() == [True, False, True, False]
    tanh = torch.cat((rows + 5, rows - 5, rows), 1).tanh()
    assert metrics.saturated(tanh, "tanh").tolist() == [True, True, False]
    sigmoid = torch.cat((rows - 8, rows + 8, rows + 3), 1).sigmoid()
    assert metrics.saturated(sigmoid, "sigmoid").tolist() == [True, True, False]
    assert not metrics.saturated(F.leaky_relu(rows - 5), "leaky-relu").any()


def test_linearised() -> None:
    rows = torch.linspace(-1, 1, 51).unsqueeze(-1)
    shifted = torch.cat((rows + 2, rows - 2, rows), 1)
    assert metrics.linearised(shifted.relu(), "relu").tolist() == [True, False, False]
    leaky = F.leaky_relu(shifted, 0.1)
    assert metrics.linearised(leaky, "leaky-relu").tolist() == [True, True, False]
    pairs = torch.stack((shifted.relu(), (-shifted).relu()), -1)
    assert metrics.linearised(pairs, "crelu").tolist() == [True, True, False]
    small = torch.cat((0.09 * rows, 0.2 * rows), 1)
    assert metrics.linearised(small.tanh(), "tanh").tolist() == [True, False]
    assert metrics.linearised((2 * small).sigmoid(), "sigmoid").tolist() == [True, False]


def test_duplicates_leave_out_silent_units() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 100, 6)
    h[0, :, 1] = 3 * h[0, :, 0]
    h[0, :, 2:4] = 0.0
    h[1, :, 5] = -h[1, :, 0]  # opposite is not the same
    found = metrics.duplicates(h.double().mT @ h.double())
    assert found.tolist() == [[True, True, False, False, False, False], [False] * 6]


def test_entropies_and_drift() -> None:
    assert metrics.gaussian_entropy(torch.zeros(2, 3)).tolist() == pytest.approx([3 * 1.418939] * 2)
    assert metrics.gaussian_entropy(torch.tensor([1.0])).item() == pytest.approx(2.418939)
    even = torch.zeros(5, 4)
    assert metrics.categorical_entropy(even).item() == pytest.approx(math.log(4))
    sure = torch.tensor([[1000.0, 0.0], [0.0, 0.0]])
    assert metrics.categorical_entropy(sure).item() == pytest.approx(math.log(2) / 2)
    normal = torch.distributions.Normal(0.0, 2.0)
    assert metrics.gaussian_entropy(sigma(math.log(2.0))).item() == pytest.approx(normal.entropy())
    a, b = sigma(1.0, 4.0), sigma(2.0, 2.0)
    assert metrics.drift(a, a, a + 3, a).tolist() == [3.0, 3.0]
    assert metrics.drift(a, a, b, b).tolist() == pytest.approx([2**0.5, 8**0.5])


class Functional(nn.Module):
    """Nonlinearities that no module tells."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 3, 2)
        self.body = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
        self.pair, self.wide, self.end = nn.Linear(8, 4), nn.Linear(8, 6), nn.Linear(6, 2)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.image(x).relu(), 2).flatten(1)
        x = self.norm(self.body[0](x)).tanh()
        x = F.leaky_relu(self.body[1](x), 0.2)
        x = torch.sigmoid(self.body[2](x))
        x = self.pair(x)
        x = torch.cat((x.relu(), (-x).relu()), -1)
        return self.end(F.gelu(self.wide(x)))


def test_nonlinearities_are_recognised_behind_norms_pooling_and_functions() -> None:
    units = find_units(Functional(), torch.zeros(1, 1, 5, 5))
    found = {site.name: site.nonlinearity for site in units}
    assert found == {
        "image": "relu", "body.0": "tanh", "body.1": "leaky-relu", "body.2": "sigmoid",
        "pair": "crelu", "wide": "",
    }  # fmt: skip

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.c(x + self.b(x).relu())

    found = {s.name: s.nonlinearity for s in find_units(Residual(), torch.zeros(1, 4))}
    assert found["b"] == ""  # what the reader sees is a sum
    batched = nn.Sequential(BatchedLinear(3, 4, 5), nn.Tanh(), BatchedLinear(3, 5, 2))
    assert [s.nonlinearity for s in find_units(batched, torch.zeros(3, 1, 4))] == ["tanh"]


def net_of_ten() -> nn.Sequential:
    """10 ReLU units on inputs in [-1, 1]: 3 always active, 2 never, copies of one another none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].bias[:3] = 100.0
        net[0].bias[3:5] = -100.0
    return net


def test_measure_tells_units_and_features() -> None:
    net = net_of_ten()
    units = find_units(net, torch.zeros(1, 4))
    x = 2 * torch.rand(64, 4) - 1
    net(x).sum().backward()
    found = metrics.measure(units)
    assert found["net/0/linearised_fraction"] == pytest.approx(0.3)
    assert found["net/0/saturated_fraction"] == pytest.approx(0.2)
    h = [net[:2](x).detach(), net[:4](x).detach()]
    lines = [(a > 0).all(0).float().sum() for a in h]
    assert found["net/linearised_fraction"] == pytest.approx(float(sum(lines) / 18))
    for place, a in enumerate(h):
        assert found[f"net/{place}/feature_norm"] == pytest.approx(float(a.norm(dim=1).mean()))
    assert found["net/feature_norm"] == found["net/1/feature_norm"]
    cosines = F.cosine_similarity(h[1].T[:, None], h[1].T[None], -1).fill_diagonal_(0)
    expected = (cosines > 0.99).any(1).float().mean()
    assert found["net/duplicate_fraction"] == pytest.approx(float(expected))
    values = torch.linalg.svdvals(h[1].double())
    assert found["net/srank"] == metrics.srank(values).item()
    assert found["net/feature_rank"] == metrics.feature_rank(values, 64).item()
    ratio = metrics.participation_ratio(values).item()
    assert found["net/participation_ratio"] == pytest.approx(ratio, rel=1e-6)
    assert "net/1/preactivation_drift" not in found  # needs units.recording()


def test_distances_and_gradients() -> None:
    net = net_of_ten()
    units = find_units(net, torch.zeros(1, 4))
    x = torch.randn(64, 4)

    def measured() -> dict[str, float]:
        with torch.no_grad(), units.recording():
            net(x)
        return dict(metrics.measure(units))

    first = measured()
    for name in ("distance_to_init", "weight_change", "preactivation_drift"):
        assert first[f"net/{name}"] == first[f"net/0/{name}"] == 0.0
    assert not any("gradient" in key for key in first)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    net(x).square().sum().backward()
    norms = [float(net[k].weight.grad.norm()) for k in (0, 2, 4)]
    optimizer.step()
    with torch.no_grad():
        net[0].bias.copy_(before[1] + 0.25)  # shifts every pre-activation of the first layer
        net[0].weight.copy_(before[0])
    second = measured()
    assert second["net/0/preactivation_drift"] == pytest.approx(0.25, abs=1e-5)
    assert second["net/0/weight_change"] == second["net/0/distance_to_init"] == 0.0
    old = before[2]
    size = old.numel() ** 0.5
    assert second["net/1/distance_to_init"] == pytest.approx(0.1 * norms[1] / size, rel=1e-4)
    assert second["net/1/weight_change"] == pytest.approx(0.1 * norms[1] / float(old.norm()), 1e-4)
    count = sum(net[k].weight.numel() for k in (0, 2, 4))
    total = (norms[1] ** 2 + norms[2] ** 2) ** 0.5
    assert second["net/distance_to_init"] == pytest.approx(0.1 * total / count**0.5, rel=1e-4)
    grads = [net[k].weight.grad for k in (0, 2, 4)]
    zeros = [float((g == 0).float().mean()) for g in grads]
    assert zeros[0] >= 0.2  # rows of units that are never active
    for place in range(3):
        assert second[f"net/{place}/gradient_zero_fraction"] == pytest.approx(zeros[place])
    every = float(torch.cat([(g == 0).flatten() for g in grads]).float().mean())
    assert second["net/gradient_zero_fraction"] == pytest.approx(every)
    third = measured()
    assert third["net/weight_change"] == 0.0  # since the second
    assert third["net/distance_to_init"] == second["net/distance_to_init"]
    assert third["net/preactivation_drift"] == second["net/preactivation_drift"]


def test_references_continue_copy_by_copy() -> None:
    def make(seed: int) -> tuple[nn.Sequential, object]:
        torch.manual_seed(seed)
        net = nn.Sequential(BatchedLinear(2, 4, 5), nn.Tanh(), BatchedLinear(2, 5, 2))
        return net, find_units(net, torch.zeros(2, 1, 4))

    def measured(net: nn.Sequential, units) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        with torch.no_grad(), units.recording():
            net(x)
        return dict(metrics.measure(units))

    x = torch.randn(2, 32, 4)
    whole, units = make(0)
    measured(whole, units)
    with torch.no_grad():
        for p in whole.parameters():
            p.add_(0.1)
    measured(whole, units)
    other, others = make(1)  # another process: another start
    other.load_state_dict(whole.state_dict())
    saved = [units.references.state_of(copy) for copy in range(2)]
    for copy in range(2):
        others.references.load_state_of(copy, saved[copy])
    by_dict, dicts = make(2)
    by_dict.load_state_dict(whole.state_dict())
    dicts.references.load_state_dict(units.references.state_dict())
    with torch.no_grad():
        for net in (whole, other, by_dict):
            net[0].weight[1].mul_(2.0)
    expected = measured(whole, units)
    assert expected["net/weight_change"][0] == 0.0 and expected["net/weight_change"][1] > 0.1
    for net, found in ((other, others), (by_dict, dicts)):
        for key, value in measured(net, found).items():
            assert torch.equal(value, expected[key]), key
    small = nn.Sequential(BatchedLinear(2, 4, 3), nn.Tanh(), BatchedLinear(2, 3, 2))
    few = find_units(small, torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="do not fit this network"):
        few.references.load_state_of(0, saved[0])


def test_every_metric_has_a_line_and_they_are_listed_without_torch() -> None:
    net = net_of_ten()
    units = find_units(net, torch.zeros(1, 4))
    net(torch.randn(9, 4)).sum().backward()
    with torch.no_grad(), units.recording():
        net(torch.randn(9, 4))
    names = {key.rpartition("/")[2] for key in metrics.measure(units, ranks="all")}
    assert names | {"policy_entropy"} == set(registry.METRICS)
    assert all(line and "\n" not in line and len(line) < 90 for line in registry.METRICS.values())
    code = (
        "import sys, perennial.plasticity.registry as r; "
        "print(len(r.METRICS), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(len(registry.METRICS)), "False"]


def test_measure_is_cheap_enough_to_be_on_by_default() -> None:
    """Two 256-256 networks and 1024 rows: 15 ms on one idle core; here it must not be far more."""
    torch.manual_seed(0)
    copies, threads = 1, torch.get_num_threads()
    net = nn.ModuleDict(
        {
            name: nn.Sequential(
                BatchedLinear(copies, 105, 256), nn.ReLU(), BatchedLinear(copies, 256, 256),
                nn.ReLU(), BatchedLinear(copies, 256, n_out),
            )
            for name, n_out in (("policy", 8), ("value", 1))
        }
    )  # fmt: skip

    def forward(x: Tensor) -> list[Tensor]:
        return [part(x) for part in net.values()]

    torch.set_num_threads(1)
    try:
        units = find_units(net, torch.zeros(1, 1, 105), forward)
        sum(out.sum() for out in forward(torch.randn(1, 1024, 105))).backward()
        times = []
        for _ in range(15):
            start = time.process_time()
            metrics.measure(units)
            times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times) < 0.045
