"""Every plasticity method with settings for the common tests, and a network in training with it.

A new method gets a line in ACTING and one in NULL; a test tells when it has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity import (
    BatchedAdam,
    BatchedConv2d,
    BatchedLinear,
    Handle,
    Init,
    attach,
    find_units,
)
from perennial.plasticity.architecture import rewrite, rewriters
from perennial.plasticity.registry import METHODS

# Settings at which a method acts within a few steps.
ACTING: dict[str, list[str]] = {
    "cbp": [
        "cbp:rate=0.1,maturity=4",
        "cbp:rate=0.1,maturity=4,utility=mean-corrected,count=accumulate",
        "cbp:rate=0.1,maturity=4,utility=random,moments=zero",
        "cbp:rate=0.3,maturity=2,reference=nature,utility=adaptable",
    ],
    "redo": [
        "redo:threshold=0.7,every=5,batches=3",
        "redo:threshold=0.7,every=4,reference=paper",
        "redo:threshold=0.7,every=4,reference=nature",
    ],
    "snr": ["snr:percentile=0.6,initial=1,every=5,check=2"],
    "regrama": ["regrama:threshold=0.7,every=5,batches=3", "regrama:threshold=0.7,every=4"],
    "l2": ["l2:strength=0.01", "l2:strength=0.01,scope=weights"],
    "weight-decay": ["weight-decay:strength=0.1", "weight-decay:strength=0.1,scope=all"],
    "l2-init": [
        "l2-init:strength=0.01",
        "l2-init:strength=0.01,distance=l1,decoupled=true,scope=weights",
        "l2-init:strength=0.01,distance=norm",
        "l2-init:strength=0.01,distance=wasserstein,every=3,average=true",
        "l2-init:strength=0.01,resample=true,scope=all",
    ],
    "spectral": ["spectral:strength=0.05", "spectral:strength=0.05,exponent=1,biases=false"],
    "parseval": [
        "parseval:strength=0.01,every=1",
        "parseval:strength=0.01,every=4,groups=2,normalize=true",
    ],
    "infer": ["infer:strength=0.01,heads=3,scale=2,every=1", "infer:strength=0.01,heads=3,every=4"],
    "adam-equal-betas": ["adam-equal-betas"],
    "layer-norm": ["layer-norm", "layer-norm:affine=false"],
    "crelu": ["crelu", "crelu:width=keep"],
    "fourier": ["fourier", "fourier:width=keep"],
    "nap": ["nap", "nap:gains=fixed,every=3"],
    "weight-norm": ["weight-norm", "weight-norm:per=unit,scope=all,scale=0.8,every=3"],
    "simba": ["simba", "simba:version=2,blocks=2,expansion=2"],
    "shrink-perturb": [
        "shrink-perturb:every=5",
        "shrink-perturb:every=6,draw=normal,noise=0.01,scope=all,head=reset,optimizer=reset",
        "shrink-perturb:every=1,shrink=0.99,draw=initial,adapt=dormancy,head=keep,times=4",
    ],
    "reset": ["reset:every=7", "reset:every=10,times=1,change=true,optimizer=keep"],
    "head-reset": [
        "head-reset:every=7",
        "head-reset:every=9,depth=2,to=zero,optimizer=keep,change=true",
    ],
    "optimizer-reset": ["optimizer-reset:every=5", "optimizer-reset:every=4,what=step"],
    "injection": ["injection:every=7", "injection:every=5,times=2,depth=1,change=true"],
    "hare-tortoise": [
        "hare-tortoise:every=6,momentum=0.8",
        "hare-tortoise:every=9,momentum=0.8,change=true,optimizer=reset",
    ],
}
# Settings at which it does nothing to a network in training. Methods that only change the network
# do nothing once that has been done. None: there is no such setting.
NULL: dict[str, str | None] = {
    "cbp": "cbp:rate=0",
    "redo": "redo:threshold=-1,every=3",
    "snr": "snr:percentile=1,check=2",
    "regrama": "regrama:threshold=-1,every=3",
    "l2": "l2:strength=0",
    "weight-decay": "weight-decay:strength=0",
    "l2-init": "l2-init:strength=0",
    "spectral": "spectral:strength=0",
    "parseval": "parseval:strength=0",
    "infer": "infer:strength=0",
    "adam-equal-betas": "adam-equal-betas:beta=0.9",  # with an Adam of these betas
    "layer-norm": "layer-norm",
    "crelu": "crelu",
    "fourier": "fourier",
    "nap": "nap:every=0",
    "weight-norm": "weight-norm:every=0",
    "simba": "simba",
    "shrink-perturb": "shrink-perturb:every=2,shrink=1,noise=0",
    "reset": "reset:every=0",
    "head-reset": "head-reset:every=0",
    "optimizer-reset": "optimizer-reset:every=0",
    "injection": "injection:every=0",
    "hare-tortoise": "hare-tortoise:every=0",
}
NEEDS_ADAM = ("adam-equal-betas",)
RECYCLING = ("cbp", "redo", "snr", "regrama")


def acting(names: Sequence[str] = tuple(METHODS)) -> list[str]:
    """Specs of all methods of the registry; a method without a line above has its bare name."""
    return [spec for name in names for spec in ACTING.get(name, [name])]


def method_of(spec: str) -> str:
    return spec.partition(":")[0]


def adam(parameters: object, lr: float) -> Optimizer:
    return torch.optim.Adam(parameters, lr=lr)  # type: ignore[arg-type]


def sgd(parameters: object, lr: float) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)  # type: ignore[arg-type]


def batched(
    seeds: Sequence[int], dtype: torch.dtype, widths: Sequence[int] = (3, 8, 8, 2)
) -> nn.Sequential:
    """Linear layers and ReLU for several seeds, each drawn from its own generator."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        init = Init("lecun-uniform")
        layer = BatchedLinear(
            len(seeds), n_in, n_out, init=init, generators=generators, dtype=dtype
        )
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def shallow(seeds: Sequence[int], dtype: torch.dtype) -> nn.Sequential:
    """The same with one hidden layer: quick to compile."""
    return batched(seeds, dtype, (3, 8, 2))


def plain(seeds: Sequence[int], dtype: torch.dtype) -> nn.Sequential:
    """The same for one seed with torch's own layers, and the same weights."""
    with torch.random.fork_rng():
        net = nn.Sequential(
            nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
        ).to(dtype)
    for ours, theirs in zip(net.parameters(), batched(seeds, dtype).parameters(), strict=True):
        ours.data.copy_(theirs.data[0])
    for place in (0, 2, 4):
        net[place].init = Init("lecun-uniform")  # type: ignore[assignment]
    return net


class Image(nn.Module):
    """Rows of 3 numbers as 1x6x6 images, then convolutions and a flattened linear layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 2, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 2),
        ).to(dtype)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x.repeat(1, 2)[:, None, :, None] * x.repeat(1, 2)[:, None, None]).sin())


def convolutional(seeds: Sequence[int], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seeds[0])
        return Image(dtype)


class Images(nn.Module):
    """The same for several seeds: rows `[S, B, 3]`."""

    def __init__(self, seeds: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        copies, init = len(seeds), Init("lecun-uniform")
        draw = {"init": init, "generators": [torch.Generator().manual_seed(s) for s in seeds]}
        self.net = nn.Sequential(
            BatchedConv2d(copies, 1, 4, 3, **draw), nn.ReLU(),
            BatchedConv2d(copies, 4, 6, 2, stride=2, **draw), nn.ReLU(), nn.Flatten(2),
            BatchedLinear(copies, 24, 8, **draw), nn.ReLU(), BatchedLinear(copies, 8, 2, **draw),
        ).to(dtype)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 1, 2)
        return self.net((x[:, :, None, :, None] * x[:, :, None, None]).sin())


def batched_images(seeds: Sequence[int], dtype: torch.dtype) -> nn.Module:
    """Convolutions for several seeds."""
    return Images(seeds, dtype)


def images(seeds: Sequence[int], dtype: torch.dtype) -> nn.Module:
    """The same for one seed with torch's own layers, and the same weights."""
    net = convolutional(seeds, dtype)
    theirs = batched_images(seeds, dtype)
    for p, q in zip(net.parameters(), theirs.parameters(), strict=True):
        p.data.copy_(q.data[0])
    for module in net.modules():
        if hasattr(module, "weight"):
            module.init = Init("lecun-uniform")  # type: ignore[assignment]
    return net


def batches(seeds: Sequence[int], steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Every seed's own data, `[S, 16, 3]` per step."""
    streams = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    return [
        torch.stack([torch.randn(16, 3, generator=g, dtype=dtype) for g in streams])
        for _ in range(steps)
    ]


class Run:
    """A network in training with methods attached, whose handle is called by the loop.

    Args:
        specs: methods.
        seeds: one copy each; plain and convolutional networks have one.
        optimizer: `(parameters, lr)` -> optimizer.
        network: `(seeds, dtype)` -> network.
        attached: False to only change the network, as the methods that do so say.
    """

    def __init__(
        self,
        specs: Sequence[str],
        seeds: Sequence[int] = (0,),
        dtype: torch.dtype = torch.float64,
        optimizer: Callable[..., Optimizer] = BatchedAdam,
        network: Callable[..., nn.Module] = batched,
        attached: bool = True,
    ) -> None:
        self.seeds = seeds
        self.stacked = network in (batched, shallow, batched_images)
        self.net = network(seeds, dtype)
        if rewriters(specs):
            generators = [torch.Generator().manual_seed(100 + seed) for seed in seeds]
            with torch.random.fork_rng():
                torch.manual_seed(seeds[0])
                rewrite(self.net, specs, generators=generators if self.stacked else None)
        self.call: Callable[[Tensor], Tensor] = self.net
        self.optimizer = optimizer(self.net.parameters(), lr=0.01)
        self.attach(specs if attached else [])

    def attach(self, specs: Sequence[str]) -> None:
        dtype = next(self.net.parameters()).dtype
        example = torch.ones(len(self.seeds), 1, 3, dtype=dtype)
        units = find_units(self.net, example if self.stacked else example[0])
        self.handle: Handle = attach(
            list(specs), units, self.optimizer, seeds=self.seeds, hooks=False
        )

    def gradients(self, x: Tensor) -> None:
        """Forward and backward of a batch `[S, B, 3]`."""
        x = x if self.stacked else x[0]
        self.optimizer.zero_grad(set_to_none=False)
        (self.call(x).sin() - x[..., :2]).square().mean((-1, -2)).sum().backward()

    def move(self, active: Sequence[bool] | None = None) -> None:
        """What a loop does with the gradients."""
        self.handle.before_step(active)
        if active is None:
            self.optimizer.step()
        else:
            self.optimizer.step(active)  # type: ignore[arg-type]  # BatchedAdam
        self.handle.after_step(active)

    def train(self, data: Sequence[Tensor], changes: Sequence[int] = ()) -> Run:
        """Steps on the data; the task changes before those in `changes`."""
        for place, x in enumerate(data):
            if place in changes:
                self.handle.on_change()
            self.gradients(x)
            self.move()
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Weights, the optimizer's state and the methods' state: all that the future depends on."""
        found = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        for number, p in enumerate(self.net.parameters()):
            state = self.optimizer.state.get(p, {})
            found |= {
                f"optimizer.{number}.{k}": v for k, v in state.items() if isinstance(v, Tensor)
            }
        found |= {f"handle.{k}": v for k, v in self.handle.state_dict().items()}
        return {k: v.detach().clone() for k, v in found.items()}

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]
