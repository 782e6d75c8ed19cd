"""Small networks, and training steps of them, for tests of plasticity methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perennial.plasticity import BatchedAdam, BatchedLinear, Handle, Init, attach, find_units

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "batched": lambda p: BatchedAdam(p, lr=0.01),
}


def plain(seed: int = 0, bias: bool = True) -> nn.Sequential:
    """3-16-16-2, stock modules, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(3, 16, bias=bias),
            nn.ReLU(),
            nn.Linear(16, 16, bias=bias),
            nn.ReLU(),
            nn.Linear(16, 2, bias=bias),
        ).double()


def batched(copies: int, init: Init | None = None, seeds: list[int] | None = None) -> nn.Sequential:
    """3-16-16-2 for some copies, float64; copies of one seed are the same."""
    layers: list[nn.Module] = []
    generators = [torch.Generator().manual_seed(s) for s in seeds or range(copies)]
    for n_in, n_out in ((3, 16), (16, 16), (16, 2)):
        layers += [
            BatchedLinear(
                copies, n_in, n_out, init=init, generators=generators, dtype=torch.float64
            ),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers[:-1])


def batch(number: int, copies: int | None = None, rows: int = 8) -> Tensor:
    """Inputs `[rows, 3]`, or the same for every copy `[copies, rows, 3]`; one set per number."""
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return x if copies is None else x.expand(copies, rows, 3)


def copies_of(net: nn.Module) -> int | None:
    """Copies of a batched network."""
    return next((m.copies for m in net.modules() if isinstance(m, BatchedLinear)), None)


def put_to(
    net: nn.Module, specs: str | list[str], optimizer: torch.optim.Optimizer, **options: object
) -> Handle:
    """Attach methods to one of the networks above."""
    units = find_units(net, batch(0, copies_of(net)))
    return attach(specs, units, optimizer, **options)  # type: ignore[arg-type]


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, still: bool = False
) -> None:
    """Fit the sum of inputs; `still`: with gradients of zero."""
    for step in steps:
        x = batch(step, copies_of(net))
        loss = (net(x) - x.sum(-1, keepdim=True)).square().mean((-1, -2)).sum()
        optimizer.zero_grad()
        (0 * loss if still else loss).backward()
        optimizer.step()


def weights(net: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in net.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
