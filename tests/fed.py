"""Networks whose hidden activations a test gives, and tiny trainings, for recycling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity import (
    BatchedLinear,
    Handle,
    Init,
    Intervention,
    attach,
    find_units,
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


class ConvNet(nn.Module):
    """conv -> pool -> conv -> flatten -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 2)
        self.fc, self.out = nn.Linear(6 * 9, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.out(F.relu(self.fc(F.relu(self.conv2(x)).flatten(1))))
