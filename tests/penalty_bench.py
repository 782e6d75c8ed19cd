"""Networks on which one penalty works alone, and autograd's gradient of the same penalty."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from perennial.plasticity import BatchedLinear, Handle, Init, attach, find_units, make

Penalty = Callable[[], Tensor]


def mlp(copies: int = 0, sizes: tuple[int, ...] = (3, 8, 6, 2)) -> nn.Sequential:
    """A float64 MLP: torch's layers, or batched ones where `copies` are asked for."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        init = Init("orthogonal", 2**0.5)
        layers += [BatchedLinear(copies, n_in, n_out, init=init)] if copies else [
            nn.Linear(n_in, n_out)
        ]  # fmt: skip
        if k < len(sizes) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers).double()


def image() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6), nn.ReLU(),
        nn.Linear(6, 2),
    ).double()  # fmt: skip


NETS = {"plain": mlp, "two copies": lambda: mlp(2), "one copy": lambda: mlp(1), "image": image}
SHAPES = {"plain": (5, 3), "two copies": (2, 5, 3), "one copy": (1, 5, 3), "image": (5, 1, 6, 6)}


class Bench:
    """A network with one method on SGD; the loss is zero, so gradients are the penalty's own."""

    def __init__(self, kind: str, spec: str, lr: float = 0.1, adam: bool = False) -> None:
        self.net = NETS[kind]()
        self.x = torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(3)).double()
        self.optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(
            self.net.parameters(), lr=lr
        )
        self.handle: Handle = attach(
            make(spec), find_units(self.net, self.x), self.optimizer, hooks=False
        )

    def perturb(self, size: float = 0.3, seed: int = 4) -> None:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.net.parameters():
                p.add_(size * torch.randn(p.shape, generator=g, dtype=p.dtype))

    def pulls(self) -> dict[str, Tensor]:
        """What the method adds to the gradients."""
        self.optimizer.zero_grad()
        (self.net(self.x).sum() * 0).backward()
        self.handle.before_step()
        return {n: p.grad.clone() for n, p in self.net.named_parameters() if p.grad is not None}

    def expected(self, penalty: Penalty) -> dict[str, Tensor]:
        """Autograd's gradient of the penalty."""
        names, params = zip(*self.net.named_parameters(), strict=True)
        grads = torch.autograd.grad(penalty(), params, allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g
            for n, p, g in zip(names, params, grads, strict=True)
        }

    def check(self, penalty: Penalty) -> None:
        ours, theirs = self.pulls(), self.expected(penalty)
        assert any(bool(g.any()) for g in theirs.values())
        for name, g in theirs.items():
            torch.testing.assert_close(ours[name], g, rtol=1e-9, atol=1e-12, msg=name)

    def matrices(self, hidden: bool = False) -> list[Tensor]:
        """Weights `[S, out, in]`, of hidden layers only or of all."""
        layers = [m for m in self.net if isinstance(m, nn.Linear | nn.Conv2d | BatchedLinear)]
        weights = [m.weight for m in (layers[:-1] if hidden else layers)]
        return [
            w if isinstance(m, BatchedLinear) else w.flatten(1)[None]
            for m, w in zip(layers, weights, strict=False)
        ]
