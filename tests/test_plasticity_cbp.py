"""Continual backprop against its oracles and against the rule written unit by unit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from perennial.plasticity import (
    BatchedAdam,
    BatchedLinear,
    ContinualBackprop,
    Handle,
    Init,
    attach,
    find_units,
)
from perennial.plasticity.units import Units


class Fed(nn.Module):
    """One hidden layer whose activations are given: h -> out weights. A stage for the oracles."""

    def __init__(self, n: int, outs: int = 1) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(1, n).double(), nn.Linear(n, outs).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


def stage(
    n: int, method: ContinualBackprop, outs: int = 1
) -> tuple[Fed, Units, Handle, ContinualBackprop]:
    torch.manual_seed(0)
    net = Fed(n, outs)
    units = find_units(net, torch.zeros(1, 1, dtype=torch.float64))
    handle = attach(method, units, torch.optim.SGD(net.parameters(), 0.0), hooks=False)
    return net, units, handle, method


def feed(units: Units, handle: Handle, *activations: Tensor) -> None:
    """Steps of the handle in which the hidden layer shows the given activations [B, n]."""
    for h in activations:
        units.record(units.sites[0].consumers[0].layer.module, h.double())
        handle.before_step()
        handle.after_step()


def test_constant_activation_and_weights_give_utility_y_at_every_age() -> None:
    net, units, handle, cbp = stage(3, ContinualBackprop(maturity=100))
    h = torch.tensor([[1.0, -2.0, 0.5]] * 4)
    y = h[0].abs() * net.out.weight[0].detach().abs()
    for age in range(1, 8):
        feed(units, handle, h)
        torch.testing.assert_close(cbp.utility[0] / (1 - 0.99**age), y)
        torch.testing.assert_close(cbp.mean[0] / (1 - 0.99**age), h[0].double())
        assert cbp.age.tolist() == [[age] * 3]


def test_the_lowest_contribution_goes() -> None:
    net, units, handle, cbp = stage(2, ContinualBackprop(rate=0.5, maturity=0, count="accumulate"))
    with torch.no_grad():
        net.out.weight.copy_(torch.tensor([[3.0, 1.0]]))
    row = net.inner.weight.detach().clone()
    feed(units, handle, torch.tensor([[1.0, 2.0]]))  # contributions (3, 2)
    assert net.out.weight.tolist() == [[3.0, 0.0]]
    assert net.inner.weight[0] == row[0] and net.inner.weight[1] != row[1]
    assert cbp.age.tolist() == [[1, 0]] and cbp.replaced.tolist() == [1]


@pytest.mark.parametrize("reference", ["exact", "nature"])
def test_compensation_keeps_the_function_when_a_constant_unit_goes(reference: str) -> None:
    net, units, handle, _ = stage(
        3, ContinualBackprop(rate=1 / 3, maturity=2, reference=reference), outs=2
    )
    h = torch.rand(16, 3, dtype=torch.float64) + 3.0
    h[:, 1] = 0.25  # constant for all inputs, and the least useful
    with torch.no_grad():
        net.out.weight[:, 1] = torch.tensor([0.4, -0.2])
    before = net.out(h).detach()
    column = net.out.weight[:, 1].detach().clone()
    feed(units, handle, h, h, h)
    assert net.out.weight[:, 1].tolist() == [0.0, 0.0]
    shift = net.out(h).detach() - before
    expected = torch.zeros(2).double() if reference == "exact" else -0.25 * column
    torch.testing.assert_close(shift, expected.expand_as(shift), rtol=0, atol=1e-12)


def test_mean_corrected_utility_of_a_constant_unit_vanishes() -> None:
    h = torch.tensor([[1.0, 2.0], [1.0, -2.0]])
    for kind, constant_is_zero in (("mean-corrected", True), ("contribution", False)):
        _, units, handle, cbp = stage(2, ContinualBackprop(maturity=100, utility=kind))
        feed(units, handle, *[h] * 5)
        assert (cbp.utility[0, 0].abs() < 1e-15) == constant_is_zero
        assert cbp.utility[0, 1] > 1e-3


@pytest.mark.parametrize(
    "kind", ["contribution", "mean-corrected", "adaptable", "adaptation", "weight"]
)
def test_utilities_against_the_rule_unit_by_unit(kind: str) -> None:
    net, units, handle, cbp = stage(
        4, ContinualBackprop(maturity=100, utility=kind, decay=0.9), outs=3
    )
    utility, mean = [0.0] * 4, [0.0] * 4
    for age in range(1, 6):
        h = torch.randn(7, 4, dtype=torch.float64)
        feed(units, handle, h)
        for i in range(4):
            out = sum(abs(net.out.weight[k, i].item()) for k in range(3)) / 3
            into = abs(net.inner.weight[i, 0].item())
            mean[i] = 0.9 * mean[i] + 0.1 * sum(h[:, i].tolist()) / 7
            centre = mean[i] / (1 - 0.9**age)
            size = sum(abs(x) for x in h[:, i].tolist()) / 7
            spread = sum(abs(x - centre) for x in h[:, i].tolist()) / 7
            y = {
                "contribution": size * out,
                "mean-corrected": spread * out,
                "adaptable": spread * out / into,
                "adaptation": 1 / into,
                "weight": out,
            }[kind]
            utility[i] = 0.9 * utility[i] + 0.1 * y
        torch.testing.assert_close(cbp.utility[0], torch.tensor(utility).double())
        torch.testing.assert_close(cbp.mean[0], torch.tensor(mean).double())


def test_nothing_before_maturity_and_possible_right_after() -> None:
    _, units, handle, cbp = stage(4, ContinualBackprop(rate=1.0, maturity=5))
    h = torch.rand(3, 4)
    feed(units, handle, *[h] * 5)
    assert cbp.replaced.tolist() == [0] and cbp.age.tolist() == [[5] * 4]
    feed(units, handle, h)
    assert cbp.replaced.tolist() == [4] and cbp.age.tolist() == [[0] * 4]


def test_accumulated_counts_replace_every_second_step() -> None:
    _, units, handle, cbp = stage(4, ContinualBackprop(rate=1 / 8, maturity=0, count="accumulate"))
    seen = []
    for _ in range(12):
        feed(units, handle, torch.rand(3, 4))
        seen.append(int(cbp.replaced))
    assert seen == [step // 2 for step in range(1, 13)]


def test_counts_within_three_sigma() -> None:
    rate, n, steps = 0.004, 32, 3000
    for count in ("bernoulli", "accumulate"):
        _, units, handle, cbp = stage(n, ContinualBackprop(rate=rate, maturity=0, count=count))
        feed(units, handle, *[torch.rand(2, n)] * steps)
        expected = rate * n * steps
        sigma = math.sqrt(steps * rate * n * (1 - rate * n)) if count == "bernoulli" else 1.0
        assert abs(int(cbp.replaced) - expected) <= 3 * sigma, count


def test_expected_counts_above_one() -> None:
    """nature: the whole part every step, the fraction lost; else the mean is kept."""
    totals = {}
    for reference in ("exact", "nature"):
        _, units, handle, cbp = stage(
            8, ContinualBackprop(rate=0.3, maturity=0, reference=reference)
        )
        feed(units, handle, *[torch.rand(2, 8)] * 400)
        totals[reference] = int(cbp.replaced) / 400
    assert totals["nature"] == 2.0
    assert abs(totals["exact"] - 2.4) < 3 * math.sqrt(0.24 / 400)


def test_random_utility_spares_no_unit() -> None:
    _, units, handle, cbp = stage(6, ContinualBackprop(rate=0.2, maturity=3, utility="random"))
    gone = torch.zeros(6)
    for _ in range(300):
        feed(units, handle, torch.ones(2, 6))
        gone += (cbp.age[0] == 0).float()
    assert gone.min() > 20


@pytest.mark.parametrize(
    ("init", "bound"),
    [
        (Init("lecun-uniform"), math.sqrt(3 / 50)),
        (Init("kaiming-uniform", math.sqrt(2)), math.sqrt(6 / 50)),
        (Init("torch-default", bias="torch-default"), math.sqrt(1 / 50)),
    ],
    ids=lambda v: v.kind if isinstance(v, Init) else "",
)
def test_fresh_weights_come_from_the_layers_own_distribution(init: Init, bound: float) -> None:
    layer = BatchedLinear(2, 50, 40, init=init)
    net = nn.Sequential(layer, nn.ReLU(), BatchedLinear(2, 40, 3))
    units = find_units(net, torch.zeros(2, 1, 50))
    with torch.no_grad():
        layer.weight.fill_(9.0)
        layer.bias.fill_(9.0)
    handle = attach("cbp:rate=1,maturity=0", units, BatchedAdam(net.parameters()), hooks=False)
    net(torch.randn(2, 4, 50))
    handle.before_step()
    handle.after_step()
    weight = layer.weight.detach()
    assert bound * 0.99 < weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not torch.equal(weight[0], weight[1])
    expected = 0.0 if init.bias == "zeros" else bound
    assert layer.bias.abs().max() <= expected
    assert (layer.bias.abs().max() > 0.8 * expected) or expected == 0


def test_fresh_orthogonal_rows_have_the_norm_of_the_first() -> None:
    for n_in, n_out in ((50, 40), (20, 40)):
        layer = BatchedLinear(1, n_in, n_out, init=Init("orthogonal", 2.0))
        net = nn.Sequential(layer, nn.ReLU(), BatchedLinear(1, n_out, 3))
        norms = layer.weight.detach()[0].norm(dim=-1)
        units = find_units(net, torch.zeros(1, 1, n_in))
        handle = attach("cbp:rate=1,maturity=0", units, BatchedAdam(net.parameters()), hooks=False)
        net(torch.randn(1, 4, n_in))
        handle.before_step()
        handle.after_step()
        fresh = layer.weight.detach()[0].norm(dim=-1)
        assert fresh.square().mean().item() == pytest.approx(
            norms.square().mean().item(), rel=1e-5 if n_in > n_out else 0.12
        )


def test_both_ends_of_a_weight_recycled_is_zero_and_the_output_keeps() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    units = find_units(net, torch.zeros(1, 3, dtype=torch.float64))
    optimizer = torch.optim.Adam(net.parameters())
    handle = attach("cbp:rate=1,maturity=0,moments=zero", units, optimizer, hooks=False)
    x = torch.randn(4, 3, dtype=torch.float64)
    output = net(x).detach().mean(0)
    handle.before_step()
    handle.after_step()
    assert net[2].weight.eq(0).all() and net[4].weight.eq(0).all()
    assert net[2].bias.abs().max() <= 0.5 and net[0].weight.ne(0).all()
    torch.testing.assert_close(net(x).mean(0), output)  # the last bias took over the mean


def test_a_norm_on_the_way_is_neutral_again() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    units = find_units(net, torch.zeros(1, 3))
    handle = attach(
        "cbp:rate=0.25,maturity=0,count=accumulate", units,
        torch.optim.SGD(net.parameters(), 0.0), hooks=False,
    )  # fmt: skip
    with torch.no_grad():
        net[1].weight.fill_(3.0)
        net[1].bias.fill_(2.0)
        net[1].running_var.fill_(5.0)
        net[3].weight[:, 2] = 1e-6
    net.eval()
    net(torch.randn(8, 3))
    handle.before_step()
    handle.after_step()
    assert net[1].weight.tolist() == [3.0, 3.0, 1.0, 3.0]
    assert net[1].bias.tolist() == [2.0, 2.0, 0.0, 2.0]
    assert net[1].running_mean[2] == 0 and net[1].running_var.tolist() == [5.0, 5.0, 1.0, 5.0]


def test_a_channel_that_is_flattened_owns_a_block_of_columns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).double()
    units = find_units(net, torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    cbp = ContinualBackprop(maturity=0, decay=0.0, rate=1 / 4, count="accumulate")
    handle = attach(cbp, units, optimizer, hooks=False)
    with torch.no_grad():
        net[5].weight[:, 4:8] *= 1e-3  # channel 1 of the second convolution
        net[2].bias.add_(1.0)
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    h1 = net[1](net[0](x)).detach()
    h2 = net[3](net[2](h1)).detach()
    flat = (h2.flatten(1).abs().mean(0) * net[5].weight.abs().mean(0)).view(4, 4).mean(-1)
    out1 = net[2].weight.abs().mean((0, 2, 3))
    net(x)
    handle.before_step()
    utility = torch.cat((h1.abs().mean((0, 2, 3)) * out1, flat)).detach()
    lost = net[5].weight[:, 4:8].detach() @ h2.flatten(1).mean(0)[4:8]
    bias = net[5].bias.detach().clone()
    handle.after_step()
    kept = [0, 1, 2, 3, 5, 6]
    torch.testing.assert_close(cbp.utility[0, kept], utility[kept])
    assert cbp.age.tolist() == [[1, 1, 1, 1, 0, 1, 1]]
    assert net[5].weight[:, 4:8].eq(0).all() and net[5].weight.ne(0).sum() == 24
    torch.testing.assert_close(net[5].bias.detach(), bias + lost)


def test_without_activations_the_step_says_what_is_missing() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(net.parameters())
    attach("cbp", find_units(net, torch.zeros(1, 3)), optimizer)
    with pytest.raises(ValueError, match="run a training forward"):
        optimizer.step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": -1.0}, "rate=-1.0 must be >= 0 and <= 1"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"maturity": -1}, "maturity"),
        ({"decay": 1.0}, "decay"),
        ({"utility": "contributon"}, "did you mean 'contribution'"),
        ({"reference": "natur"}, "did you mean 'nature'"),
    ],
)
def test_bad_parameters(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinualBackprop(**given)  # type: ignore[arg-type]
