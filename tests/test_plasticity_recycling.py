"""Recycling by dormancy: ReDo, ReGraMa, self-normalised resets, against their oracles."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity import (
    BatchedAdam,
    BatchedLinear,
    Handle,
    Init,
    Intervention,
    ReDo,
    ReGraMa,
    SelfNormalizedResets,
    attach,
    find_units,
    make,
    metrics,
)
from perennial.plasticity.units import Units


class Fed(nn.Module):
    """One hidden layer per copy whose activations are given. A stage for the oracles."""

    def __init__(self, n: int, copies: int = 1) -> None:
        super().__init__()
        self.inner = BatchedLinear(copies, 2, n, init=Init("lecun-uniform")).double()
        self.out = BatchedLinear(copies, n, 3, init=Init("lecun-uniform")).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


def stage(n: int, method: Intervention, copies: int = 1) -> tuple[Fed, Units, Handle]:
    torch.manual_seed(0)
    net = Fed(n, copies)
    units = find_units(net, torch.zeros(copies, 1, 2, dtype=torch.float64))
    return net, units, attach(method, units, torch.optim.SGD(net.parameters(), 0.0), hooks=False)


def feed(
    units: Units, handle: Handle, *activations: Tensor, active: list[int] | None = None
) -> None:
    """Steps in which the hidden layer shows the given activations `[S, B, n]` or `[B, n]`."""
    for h in activations:
        h = h.double() if h.ndim == 3 else h.double().unsqueeze(0)
        units.record(units.sites[0].consumers[0].layer.module, h)
        handle.before_step(active)
        handle.after_step(active)


def gone(net: Fed) -> list[list[int]]:
    """Units whose outgoing weights are silent, per copy."""
    return [
        [i for i, silent in enumerate((w == 0).all(0).tolist()) if silent] for w in net.out.weight
    ]


# ---- ReDo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.025, 0.1])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_redo_recycles_the_dormant_unit_at_any_scale(threshold: float, scale: float) -> None:
    net, units, handle = stage(4, ReDo(threshold=threshold, every=1))
    rows = net.inner.weight.detach().clone()
    h = scale * torch.tensor([[0.0, 1.0, -2.0, 4.0], [0.0, -1.0, 0.0, 0.0]])  # E|h| = 0, 1, 1, 2
    score = metrics.mean_size(h)
    assert (score / score.mean()).tolist() == [0, 1, 1, 2] and score.sum() / score.mean() == 4
    feed(units, handle, h)
    assert gone(net) == [[0]]
    changed = (net.inner.weight != rows).all(-1)
    assert changed.tolist() == [[True, False, False, False]]
    assert handle.counts()["redo"].tolist() == [1]


@pytest.mark.parametrize(("threshold", "expected"), [(0.99, [0]), (1.0, [0, 1, 2])])
def test_redo_compares_with_at_most(threshold: float, expected: list[int]) -> None:
    net, units, handle = stage(4, ReDo(threshold=threshold, every=1))
    feed(units, handle, torch.tensor([[0.0, 1.0, 1.0, 2.0]]))
    assert gone(net) == [expected]


def mlp(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), *middle, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def train(net: nn.Module, optimizer: Optimizer, steps: int, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    data = [torch.randn(*shape, generator=generator) for _ in range(steps)]
    for x in data:
        optimizer.zero_grad()
        net(x.to(next(net.parameters()).dtype)).sub(1).square().mean().backward()
        optimizer.step()
    return data


def test_a_unit_that_is_always_zero_goes_without_changing_the_output() -> None:
    net = mlp(nn.ReLU())
    with torch.no_grad():
        net[0].bias[2] = -100.0
        net[2].bias[4] = -100.0
    units = find_units(net, torch.zeros(1, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach(ReDo(threshold=0.0, every=5), units, optimizer)
    x = torch.randn(64, 3)
    before = net(x).detach()
    weights = [p.detach().clone() for p in net.parameters()]
    for step in range(1, 6):
        net(x).sum().backward()
        optimizer.step()
        same = all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
        assert same == (step < 5), "nothing before the period, something after"
    assert torch.equal(net(x), before)
    assert handle.counts()["redo"].tolist() == [2]
    assert net[0].bias[2].abs() <= 1 / math.sqrt(3), "torch's default bias is drawn anew"
    assert net[0](x)[:, 2].relu().any() and net[2](net[0](x).relu())[:, 4].relu().any()


@pytest.mark.parametrize(("reference", "count"), [("exact", 3), ("paper", 3), ("nature", 0)])
def test_a_layer_of_zeros(reference: str, count: int) -> None:
    net, units, handle = stage(3, ReDo(threshold=0.1, every=1, reference=reference))
    feed(units, handle, torch.zeros(4, 3))
    assert handle.counts()["redo"].tolist() == [count]
    feed(units, handle, torch.tensor([[1.0, 0.0, 1.0]]))
    assert handle.counts()["redo"].tolist() == [count + 1] and 1 in gone(net)[0]


def test_redo_averages_the_last_minibatches_of_a_period() -> None:
    net, units, handle = stage(4, ReDo(threshold=0.5, every=5, batches=2))
    quiet, loud = torch.tensor([[0.1, 1.0, 1.0, 1.0]]), torch.tensor([[3.0, 1.0, 1.0, 1.0]])
    silent = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    feed(units, handle, loud, loud, loud, quiet, loud)  # 3.1 / 2 counts, not the first three
    assert gone(net) == [[]]
    feed(units, handle, loud, loud, loud, quiet)
    assert gone(net) == [[]]
    feed(units, handle, silent)
    assert gone(net) == [[0]]
    redo = handle.interventions["redo"]
    assert redo.score.abs().sum() == 0, "every period starts from nothing"


def test_copies_are_judged_alone_and_only_where_they_step() -> None:
    net, units, handle = stage(3, ReDo(threshold=0.1, every=2), copies=3)
    h = torch.tensor([[[0.0, 1, 1]], [[100.0, 0, 0]], [[0.01, 0.01, 0.01]]])
    feed(units, handle, h)
    feed(units, handle, h, active=[1, 2])
    assert gone(net) == [[], [1, 2], []]
    feed(units, handle, h, active=[0])
    assert gone(net) == [[0], [1, 2], []]
    assert handle.counts()["redo"].tolist() == [1, 2, 0]


def test_a_not_a_number_recycles_nothing() -> None:
    net, units, handle = stage(3, ReDo(threshold=0.5, every=1))
    feed(units, handle, torch.tensor([[0.0, 1.0, torch.nan]]))
    assert gone(net) == [[]]
    feed(units, handle, torch.tensor([[0.0, 1.0, 1.0]]))
    assert gone(net) == [[0]]


@pytest.mark.parametrize("reference", ["exact", "paper"])
def test_fresh_rows_are_drawn_as_the_layer_was_or_as_dopamine_draws(reference: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 10))
    with torch.no_grad():
        net[0].bias.fill_(-1000.0)
    own = net[0].weight.detach().clone()
    units = find_units(net, torch.zeros(1, 50))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    attach(ReDo(every=1, reference=reference), units, optimizer)
    net(torch.randn(8, 50)).sum().backward()
    optimizer.step()
    bound = 1 / math.sqrt(50) if reference == "exact" else math.sqrt(6 / 250)
    weight = net[0].weight.detach()
    assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.02
    assert (weight == own).sum() == 0, "a fresh draw, not the unit's first weights"
    assert net[2].weight.abs().sum() == 0
    assert (net[0].bias == 0).all() == (reference == "paper")


def test_where_both_ends_of_a_weight_are_recycled_it_is_zero() -> None:
    net = mlp(nn.ReLU())
    with torch.no_grad():
        net[0].bias[2] = net[2].bias[4] = -100.0
    units = find_units(net, torch.zeros(1, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach("redo:threshold=0,every=1", units, optimizer)
    row = net[2].weight[4].detach().clone()
    net(torch.randn(200, 3)).sum().backward()
    optimizer.step()
    assert net[2].weight[:, 2].tolist() == [0.0] * 5
    fresh = net[2].weight[4] != row
    assert (
        handle.counts()["redo"].tolist() == [2]
        and fresh.all()
        and net[2].weight[4].count_nonzero() == 5
    )


def test_saturated_tanh_and_negative_activations_are_not_dormant() -> None:
    net, units, handle = stage(3, ReDo(threshold=0.1, every=1))
    feed(units, handle, torch.tensor([[-1.0, 1.0, 0.5], [-1.0, -1.0, 0.5]]))
    assert gone(net) == [[]]


# ---- what a recycled unit takes with it, whichever method ----------------------------------------


class ConvNet(nn.Module):
    """conv -> pool -> conv -> flatten -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 2)
        self.fc, self.out = nn.Linear(6 * 9, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.out(F.relu(self.fc(F.relu(self.conv2(x)).flatten(1))))


class CReLUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(torch.cat((x.relu(), (-x).relu()), -1))


METHODS: dict[str, Callable[[], Intervention]] = {
    "redo": lambda: ReDo(threshold=0.0, every=10),
    "snr": lambda: SelfNormalizedResets(initial=10, check=1, every=1000),
    "regrama": lambda: ReGraMa(threshold=0.0, every=10),
}


@pytest.mark.parametrize("kind", METHODS)
def test_recycled_channels_take_their_columns_kernels_and_moments(kind: str) -> None:
    torch.manual_seed(3)
    net = ConvNet().double()
    dead = {"conv1": 1, "conv2": 4, "fc": 2}
    with torch.no_grad():
        for name in dead:  # the others surely fire
            getattr(net, name).bias.fill_(0.5)
        for name, unit in dead.items():
            getattr(net, name).bias[unit] = -1e3
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    units = find_units(net, torch.zeros(1, 2, 10, 10, dtype=torch.float64))
    handle = attach(METHODS[kind](), units, optimizer)
    train(net, optimizer, 9, (5, 2, 10, 10))
    assert net.fc.weight.count_nonzero() == net.fc.weight.numel()
    train(net, optimizer, 1, (5, 2, 10, 10))
    counted = handle.counts()[kind].tolist()
    silent = {
        "conv2": [c for c in range(4) if not net.conv2.weight[:, c].any()],
        "fc": [c for c in range(54) if not net.fc.weight[:, c].any()],
        "out": [c for c in range(7) if not net.out.weight[:, c].any()],
    }
    assert silent["conv2"] == [1] and silent["out"] == [2]
    assert silent["fc"] == list(range(36, 45)), "channel 4 owns nine columns side by side"
    assert counted == [3]
    assert net.conv2.weight[4, 1].abs().sum() == 0, "both ends recycled"
    for layer, row, column in (
        (net.conv1, 1, None), (net.conv2, 4, 1), (net.fc, 2, slice(36, 45)), (net.out, None, 2),
    ):  # fmt: skip
        for key in ("exp_avg", "exp_avg_sq"):
            kept = torch.ones_like(layer.weight, dtype=torch.bool)
            if row is not None:
                kept[row] = False
                assert optimizer.state[layer.bias][key][row] == 0
            if column is not None:
                kept[:, column] = False
            value = optimizer.state[layer.weight][key]
            assert value[~kept].abs().sum() == 0
            live = value[kept].count_nonzero() / kept.sum()
            assert live > 0.5, "the others remember"


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(("moments", "first"), [("exact", 1.0), ("zero", 0.1 / math.sqrt(0.001))])
def test_the_first_step_of_a_recycled_unit(kind: str, moments: str, first: float) -> None:
    """Exact: the learning rate, as newborn. Zeroed averages under an old step count: 3.16."""
    net = mlp(nn.ReLU()).double()
    optimizer = torch.optim.Adam(net.parameters(), 1e-5, eps=1e-30)
    units = find_units(net, torch.zeros(1, 3, dtype=torch.float64))
    x, y = torch.randn(32, 3).double(), torch.randn(32, 2).double()

    def step() -> None:
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()

    step()
    for state in optimizer.state.values():
        state["step"].fill_(100_000)
    with torch.no_grad():
        net[0].bias[2] = -100.0
    method = METHODS[kind]()
    method.treatment = moments
    handle = attach(method, units, optimizer)
    for _ in range(10):
        step()
    assert handle.counts()[kind].tolist() == [1]
    column = net[2].weight[:, 2].detach().clone()
    assert column.abs().sum() == 0
    step()
    moved = (net[2].weight[:, 2].detach() - column).abs()
    moves = moved[net[2].weight.grad[:, 2] != 0]
    assert len(moves) > 0
    torch.testing.assert_close(moves, torch.full_like(moves, first * 1e-5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("optimizer", [
    torch.optim.SGD, torch.optim.RMSprop, torch.optim.AdamW, BatchedAdam,
])  # fmt: skip
@pytest.mark.parametrize("kind", METHODS)
def test_any_optimizer_forgets_the_unit(optimizer: Any, kind: str) -> None:
    torch.manual_seed(0)
    layers = [BatchedLinear(2, 3, 6), nn.ReLU(), BatchedLinear(2, 6, 2)]
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        net[0].bias[1, 3] = -100.0
    options = {"momentum": 0.9} if optimizer in (torch.optim.SGD, torch.optim.RMSprop) else {}
    made = optimizer(net.parameters(), lr=1e-4, **options)
    units = find_units(net, torch.zeros(2, 1, 3, dtype=torch.float64))
    handle = attach(METHODS[kind](), units, made)
    train(net, made, 10, (2, 16, 3))
    assert handle.counts()[kind].tolist() == [0, 1]
    checked = 0
    for parameter, index in (
        (net[0].weight, (1, 3)), (net[0].bias, (1, 3)), (net[2].weight, (1, slice(None), 3)),
    ):  # fmt: skip
        for value in made.state[parameter].values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                assert value[index].abs().sum() == 0
                assert value[0].count_nonzero() > 0
                checked += 1
    assert checked >= 3


@pytest.mark.parametrize("kind", METHODS)
def test_before_the_optimizers_first_step_there_is_nothing_to_clear(kind: str) -> None:
    method = {"redo": "redo:every=1", "snr": "snr:initial=1,check=1", "regrama": "regrama:every=1"}
    net = mlp(nn.ReLU())
    with torch.no_grad():
        net[0].bias[2] = -100.0
    units = find_units(net, torch.zeros(1, 3))
    handle = attach(method[kind], units, torch.optim.Adam(net.parameters()), hooks=False)
    net(torch.randn(8, 3)).sum().backward()
    handle.before_step()
    handle.after_step()  # no step of the optimizer between: its state is empty
    assert net[2].weight[:, 2].abs().sum() == 0


@pytest.mark.parametrize("kind", ["redo", "snr"])
def test_a_crelu_unit_is_judged_by_both_halves_and_owns_both_columns(kind: str) -> None:
    torch.manual_seed(0)
    net = CReLUNet()
    with torch.no_grad():
        net.fc1.bias[1] = -100.0  # relu(a) is always 0, relu(-a) never
        net.fc1.weight[3], net.fc1.bias[3] = 0.0, 0.0  # both are
    units = find_units(net, torch.zeros(1, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach(METHODS[kind](), units, optimizer)
    train(net, optimizer, 10, (8, 3))
    assert handle.counts()[kind].tolist() == [1]
    assert [c for c in range(8) if not net.fc2.weight[:, c].any()] == [3, 7]


@pytest.mark.parametrize("kind", METHODS)
def test_a_recycled_unit_gets_a_neutral_norm(kind: str) -> None:
    net = mlp(nn.LayerNorm(6), nn.ReLU())
    with torch.no_grad():
        net[2 + 1].bias.fill_(0.5)
        net[1].weight.fill_(3.0)
        net[1].bias.fill_(0.5)
        net[1].bias[2] = -100.0
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach(METHODS[kind](), find_units(net, torch.zeros(1, 3)), optimizer)
    train(net, optimizer, 10, (8, 3))
    assert handle.counts()[kind] >= 1
    assert net[1].weight.tolist() == [3.0, 3.0, 1.0, 3.0, 3.0, 3.0]
    assert net[1].bias.tolist() == [0.5, 0.5, 0.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("kind", METHODS)
def test_a_network_without_free_units_is_one_clear_line(kind: str) -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.stem(x).relu()
            return self.head(z), z

    net = Stream()
    units = find_units(net, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=f"{kind} finds no units .*past every layer") as error:
        attach(METHODS[kind](), units, torch.optim.Adam(net.parameters()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", [
    "redo:threshold=-1,every=1", "regrama:threshold=-1,every=1",
    "snr:percentile=1,initial=1,check=1", "redo:every=31", "regrama:every=31", "snr:initial=31",
])  # fmt: skip
def test_null_settings_and_periods_not_reached_are_the_plain_run(spec: str) -> None:
    nets = []
    for specs in ([], [spec]):
        net = mlp(nn.ReLU())
        with torch.no_grad():
            net[0].bias[2] = -100.0
        optimizer = torch.optim.Adam(net.parameters())
        handle = attach(specs, find_units(net, torch.zeros(1, 3)), optimizer)
        state = torch.get_rng_state()
        train(net, optimizer, 30, (8, 3))
        assert torch.equal(state, torch.get_rng_state())
        assert all(count.sum() == 0 for count in handle.counts().values())
        nets.append(net)
    pairs = zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("spec", "words"), [
    ("redo:threshold=-2", "threshold=-2 must be >= -1"),
    ("redo:every=0", "every=0 must be >= 1"),
    ("redo:thresold=0.1", "did you mean 'threshold'"),
    ("redo:reference=papr", "did you mean 'paper'"),
    ("snr:percentile=0", "percentile=0 must be > 0"),
    ("snr:minimum=2000", "initial=1000 must lie between minimum=2000 and maximum=100000"),
    ("regrama:moments=mean", "moments=mean is unknown"),
    ("regram", "did you mean 'regrama'"),
])  # fmt: skip
def test_wrong_settings_are_one_line(spec: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        make(spec)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- self-normalised resets ----------------------------------------------------------------------


def firing(pattern: str) -> list[Tensor]:
    """One unit of two that fires where the pattern has an x (the other always does)."""
    fires, not_ = torch.tensor([[-1.0, 1], [0.5, -1]]), torch.tensor([[-1.0, 1], [0.0, -1]])
    return [fires if mark == "x" else not_ for mark in pattern]


def test_a_unit_that_fires_in_every_minibatch_is_never_reset() -> None:
    net, units, handle = stage(2, SelfNormalizedResets(initial=1, every=3, check=1))
    feed(units, handle, *firing("x" * 20))
    assert gone(net) == [[]] and handle.interventions["snr"].tau.tolist() == [[1, 1]]


@pytest.mark.parametrize("tau", [1, 2, 7])
def test_silence_of_tau_minibatches_resets_exactly_then(tau: int) -> None:
    net, units, handle = stage(2, SelfNormalizedResets(initial=tau, every=1000, check=1))
    snr = handle.interventions["snr"]
    feed(units, handle, *firing("x" + "." * (tau - 1) + "x" + "." * (tau - 1)))
    assert gone(net) == [[]]
    feed(units, handle, *firing("."))
    assert gone(net) == [[0]] and handle.counts()["snr"].tolist() == [1]
    assert snr.silent.tolist() == [[0, 0]] and snr.tau.tolist() == [[tau, tau]]
    assert snr.silences[0, 0].sum() == (2 if tau > 1 else 1), "the reset is logged as a silence"
    feed(units, handle, *firing("." * tau))
    assert handle.counts()["snr"].tolist() == [2]


@pytest.mark.parametrize("unit", [1, 3])
def test_tau_is_the_percentile_of_the_units_silences(unit: int) -> None:
    """Silences (B, B, B, 10 B) with percentile 0.75 give B."""
    times = [unit, unit, unit, 10 * unit]
    pattern = "".join("." * t + "x" for t in times)
    method = SelfNormalizedResets(percentile=0.75, initial=50, every=len(pattern), check=1)
    net, units, handle = stage(2, method)
    feed(units, handle, *firing(pattern[:-1]))
    assert method.tau.tolist() == [[50, 50]]
    feed(units, handle, *firing("x"))
    assert method.tau.tolist() == [[unit, 50]], "a unit that was never silent keeps its tau"
    assert method.silences.sum() == 0 and gone(net) == [[]]


def test_tau_doubles_where_silences_reach_it_and_stays_in_bounds() -> None:
    method = SelfNormalizedResets(initial=4, every=8, maximum=10, check=1)
    _, units, handle = stage(2, method)
    feed(units, handle, *firing("." * 8))
    assert method.tau.tolist() == [[8, 4]] and method.replaced.tolist() == [2]
    feed(units, handle, *firing("." * 8))
    assert method.tau.tolist() == [[10, 4]] and method.replaced.tolist() == [3]
    short = SelfNormalizedResets(percentile=0.5, initial=9, every=10, minimum=5, check=1)
    _, units, handle = stage(2, short)
    feed(units, handle, *firing(".x" * 5))
    assert short.tau.tolist() == [[5, 9]]


def test_a_handful_of_silences_does_not_shorten_tau() -> None:
    method = SelfNormalizedResets(percentile=0.9, initial=50, every=40, check=1)
    _, units, handle = stage(2, method)
    feed(units, handle, *firing(".x" * 9 + "x" * 22))  # nine of the ten that 0.9 needs
    assert method.tau.tolist() == [[50, 50]]
    feed(units, handle, *firing(".x" * 10 + "x" * 20))
    assert method.tau.tolist() == [[1, 50]]


def test_bins_of_silences() -> None:
    method = SelfNormalizedResets(maximum=5000)
    stage(2, method)
    steps = torch.arange(1, 5001)
    tops = method._tops[method._bin(steps)]
    assert (tops >= steps).all() and torch.equal(tops[:16], steps[:16])
    assert ((tops - steps) / steps).max() < 0.12
    assert method._bin(torch.tensor([9999])).item() == len(method._tops) - 1


@pytest.mark.parametrize("check", [1, 3])
def test_resets_against_the_rule_unit_by_unit(check: int) -> None:
    n, copies, steps = 6, 2, 400
    method = SelfNormalizedResets(percentile=0.8, initial=4, every=50, maximum=12, check=check)
    _, units, handle = stage(n, method, copies)
    chance = random.Random(0)
    rates = [[chance.choice((0.05, 0.3, 0.6, 0.95)) for _ in range(n)] for _ in range(copies)]
    silent = [[0] * n for _ in range(copies)]
    tau = [[4] * n for _ in range(copies)]
    logs = [[Counter[int]() for _ in range(n)] for _ in range(copies)]
    replaced = [0] * copies
    for step in range(1, steps + 1):
        fires = [[chance.random() < rate for rate in row] for row in rates]
        feed(units, handle, torch.tensor(fires).double().unsqueeze(1) - 0.5)
        for s in range(copies):
            for i in range(n):
                log = logs[s][i]
                if fires[s][i]:
                    log[silent[s][i]] += silent[s][i] > 0
                    silent[s][i] = 0
                else:
                    silent[s][i] += 1
                if step % check == 0 and silent[s][i] >= tau[s][i]:
                    log[min(silent[s][i], 12)] += 1
                    silent[s][i] = 0
                    replaced[s] += 1
                lengths = sorted(log.elements())
                if step % 50 == 0 and lengths:
                    reached = lengths[max(0, math.ceil(0.8 * len(lengths) - 1e-9) - 1)]
                    if reached >= tau[s][i]:
                        tau[s][i] = min(12, 2 * tau[s][i])
                    elif len(lengths) >= 5:
                        tau[s][i] = reached
                if step % 50 == 0:
                    log.clear()
        assert method.silent.tolist() == silent
        assert method.tau.tolist() == tau
        assert method.replaced.tolist() == replaced
    assert min(replaced) > 10 and len({t for row in tau for t in row}) > 2


def test_standing_copies_do_not_grow_silent() -> None:
    method = SelfNormalizedResets(initial=3, check=1, every=1000)
    net, units, handle = stage(2, method, copies=2)
    silent = torch.zeros(2, 1, 2)
    feed(units, handle, silent, silent)
    feed(units, handle, silent, silent, active=[1])
    assert method.silent.tolist() == [[2, 2], [1, 1]] and gone(net) == [[], [0, 1]]
    feed(units, handle, silent, active=[0])
    assert gone(net) == [[0, 1], [0, 1]] and method.replaced.tolist() == [2, 2]


# ---- ReGraMa -------------------------------------------------------------------------------------


def tanh_net() -> nn.Sequential:
    """Unit 2 of the first layer saturated, unit 4 of the second (a ReLU) dead."""
    net = mlp(nn.Tanh()).double()
    with torch.no_grad():
        net[0].bias[2] = 50.0
        net[2].bias.fill_(0.5)  # the others surely fire
        net[2].bias[4] = -100.0
    return net


@pytest.mark.parametrize(("method", "recycled"), [
    (ReGraMa(threshold=1e-6, every=1), ([2], [4])), (ReDo(threshold=0.025, every=1), ([], [4])),
])  # fmt: skip
def test_gradients_find_saturated_units_and_both_find_dead_ones(
    method: Intervention, recycled: tuple[list[int], list[int]]
) -> None:
    net = tanh_net()
    units = find_units(net, torch.zeros(1, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    attach(method, units, optimizer)
    train(net, optimizer, 1, (64, 3))
    columns = [[c for c in range(w.shape[1]) if not w[:, c].any()] for w in
               (net[2].weight, net[4].weight)]  # fmt: skip
    assert tuple(columns) == recycled


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_score_is_the_relative_mean_gradient_whatever_the_loss_is_multiplied_by(
    scale: float,
) -> None:
    torch.manual_seed(5)
    net = ConvNet().double()
    units = find_units(net, torch.zeros(1, 2, 10, 10, dtype=torch.float64))
    method = ReGraMa(every=3, batches=2)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach(method, units, optimizer, hooks=False)
    expected = torch.zeros(1, units.total, dtype=torch.float64)
    for step in range(3):
        x = torch.randn(4, 2, 10, 10, dtype=torch.float64)
        optimizer.zero_grad()
        (scale * net(x).square().mean()).backward()
        if step:
            for site, span in zip(units, units.spans, strict=True):
                layer = getattr(net, site.name)
                for i in range(site.n):
                    entries = [*layer.weight.grad[i].flatten().tolist(), layer.bias.grad[i].item()]
                    expected[0, span.start + i] += sum(map(abs, entries)) / len(entries) / (
                        (layer.weight.grad.abs().sum() + layer.bias.grad.abs().sum()).item()
                        / (len(entries) * site.n)
                    )  # fmt: skip
        if step == 2:
            break
        handle.before_step()
        handle.after_step()
    handle.before_step()
    torch.testing.assert_close(method.score, expected)
    assert method.seen.tolist() == [[2, 2, 2]]
    for span in units.spans:  # the scores of a layer average to 1
        assert math.isclose(method.score[0, span].mean(), 2)
    handle.after_step()
    assert method.score.count_nonzero() == 0 and method.seen.count_nonzero() == 0


def test_penalties_and_clipping_do_not_hide_a_unit_without_gradient() -> None:
    net = tanh_net()
    units = find_units(net, torch.zeros(1, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    handle = attach(["l2:strength=10", "regrama:threshold=1e-6,every=1"], units, optimizer)
    x = torch.randn(64, 3, dtype=torch.float64)
    net(x).sub(1).square().mean().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()
    assert handle.counts()["regrama"].tolist() == [2]
    assert net[0].weight.grad[2].abs().sum() > 0, "the penalty did join the gradient"


@pytest.mark.parametrize("middle", [
    (nn.LayerNorm(6), nn.ReLU()), (nn.ReLU(), nn.LayerNorm(6)), (nn.BatchNorm1d(6), nn.ReLU()),
])  # fmt: skip
def test_a_dead_unit_beside_a_norm_has_no_gradient_score(middle: tuple[nn.Module, ...]) -> None:
    net = mlp(*middle)
    kind = type(middle[0])
    with torch.no_grad():
        net[0].bias.fill_(0.5)
        (net[0] if kind is nn.ReLU else net[1]).bias[2] = -100.0
    units = find_units(net, torch.zeros(2, 3))
    method = ReGraMa(threshold=1e-6, every=2, batches=1)
    handle = attach(method, units, torch.optim.SGD(net.parameters(), 0.0), hooks=False)
    handle.before_step()
    handle.after_step()
    net(torch.randn(64, 3)).sub(1).square().mean().backward()
    handle.before_step()
    assert (method.score[0, :6] < 1e-6).tolist() == [i == 2 for i in range(6)]
    assert (net[0].weight.grad[2].abs().sum() > 1e-3) == (kind is nn.LayerNorm)


def test_a_layer_that_takes_no_part_in_the_loss_is_left_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(nn.ReLU()), mlp(nn.ReLU())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    net = Two()
    with torch.no_grad():
        net.a[0].bias[2] = net.b[0].bias[2] = -100.0
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    units = find_units(net, torch.zeros(1, 3))
    handle = attach(ReGraMa(threshold=0.0, every=1), units, optimizer)
    other = [p.detach().clone() for p in net.b.parameters()]
    net(torch.randn(8, 3))[0].sum().backward()
    optimizer.step()
    assert handle.counts()["regrama"] >= 1 and net.a[2].weight[:, 2].abs().sum() == 0
    assert all(torch.equal(p, q) for p, q in zip(net.b.parameters(), other, strict=True))


def test_one_copy_without_gradient_does_not_touch_another() -> None:
    net, _, handle = stage(3, ReGraMa(threshold=0.1, every=1), copies=2)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net.inner.weight.grad[1] = net.inner.bias.grad[1] = 0.0
    net.inner.weight.grad[0, 2] = net.inner.bias.grad[0, 2] = 0.0
    handle.before_step(active=[0])
    handle.after_step(active=[0])
    assert gone(net) == [[2], []]
    handle.before_step(active=[1])
    handle.after_step(active=[1])
    assert gone(net) == [[2], [0, 1, 2]]
