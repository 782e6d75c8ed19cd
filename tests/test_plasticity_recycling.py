"""What a recycled unit takes with it, whichever method of dormancy found it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perennial.plasticity import (
    BatchedAdam,
    BatchedLinear,
    Intervention,
    ReDo,
    ReGraMa,
    SelfNormalizedResets,
    attach,
    find_units,
    make,
)
from tests.fed import ConvNet, mlp, train


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
