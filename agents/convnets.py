"""Networks on pixels over all seeds of a process, and the choice between them and MLPs.

An observation is a flat vector (float) or an image, uint8 `[C, H, W]` with channels first. Images
stay uint8 until the first layer of the network, which scales them by 1/255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from perennial.agents.networks import ACTIVATIONS, MLP
from perennial.agents.settings import Config
from perennial.plasticity.copies import BatchedConv2d, BatchedLinear, Init

NATURE_SIDE = 36  # the smallest image that the three convolutions of the Nature CNN can read
# Channels, kernel, stride of each convolution; units of the hidden layer.
NATURE = (((32, 8, 4), (64, 4, 2), (64, 3, 1)), (512,))  # Mnih et al. 2015
SMALL = (((16, 3, 1),), (128,))  # Young & Tian 2019 (MinAtar)


def useful_threads(shape: Sequence[int], threads: int) -> int:
    """Threads that a matrix product may take: small images leave nothing to share."""
    return 1 if len(shape) == 3 and min(shape[1:]) < NATURE_SIDE else threads


class Pixels(nn.Module):
    """Pixels [...] of 0 to 255, of any type, as numbers of 0 to 1 in the network's type."""

    def __init__(self) -> None:
        super().__init__()
        self.white = torch.tensor(255.0)  # no buffer: those are state of one copy each

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pixels:
        """`to(...)`: the network's device and type."""
        super()._apply(fn, recurse)
        self.white = fn(self.white)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.white.dtype).div_(255.0) if x.dtype == torch.uint8 else x / self.white


def observation_shape(config: Config, space: gym.Space) -> tuple[int, ...]:
    """`(D,)` of flat observations, `(C, H, W)` of images.

    Raises:
        ValueError: one line, for spaces that our networks cannot read.
    """
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return space.shape
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 3 or space.dtype != np.uint8:
        raise ValueError(
            f"{config.agent} needs flat Box observations or uint8 images; {config.env} has {space}"
            ": choose another env"
        )
    channels, height, width = space.shape
    if channels > min(height, width) or min(height, width) < 3:
        raise ValueError(
            f"{config.agent} needs images [channels, height, width] of at least 3x3 pixels, and "
            f"{config.env} has {list(space.shape)}; put the channels first"
        )
    return space.shape


def build_net(
    config: Any,
    shape: Sequence[int],
    n_out: int,
    hidden_init: Init,
    output_init: Init,
    generators: Sequence[torch.Generator],
) -> nn.Sequential:
    """The network that fits observations of `shape`, for S = len(generators) seeds.

    An MLP [S, B, D] -> [S, B, n_out], or a CNN [S, B, C, H, W] -> [S, B, n_out].

    Args:
        config: has `net_arch` (widths of the hidden linear layers, in a CNN those after the
            convolutions; None: `config.flat_arch`, or as the CNN was published) and `activation`
            (of every hidden layer).
        shape: from `observation_shape`.
        n_out: outputs.
        hidden_init, output_init: how weights are drawn; biases as they say.
        generators: one CPU generator per copy, so that its weights do not depend on its company.
    """
    copies = len(generators)
    if len(shape) == 1:
        sizes = (*shape, *_widths(config), n_out)
        return MLP(copies, sizes, config.activation, hidden_init, output_init, generators)
    layers, width = build_trunk(config, shape, hidden_init, generators)
    last = BatchedLinear(copies, width, n_out, init=output_init, generators=generators)
    return nn.Sequential(*layers, last)


def build_trunk(
    config: Any, shape: Sequence[int], init: Init, generators: Sequence[torch.Generator]
) -> tuple[list[nn.Module], int]:
    """All layers of `build_net` but the output, and how many features they give."""
    if len(shape) == 1:
        return _hidden(_widths(config), shape[0], config.activation, init, generators)
    copies, (channels, height, width) = len(generators), shape
    convolutions, published = NATURE if min(height, width) >= NATURE_SIDE else SMALL
    layers: list[nn.Module] = [Pixels()]
    for n_out, kernel, stride in convolutions:
        layers += [
            BatchedConv2d(
                copies, channels, n_out, kernel, stride=stride, init=init, generators=generators
            ),
            ACTIVATIONS[config.activation](),
        ]
        height, width = ((side - kernel) // stride + 1 for side in (height, width))
        channels = n_out
    layers.append(nn.Flatten(2))
    widths = published if config.net_arch is None else config.net_arch
    size = channels * height * width
    more, width = _hidden(widths, size, config.activation, init, generators)
    return [*layers, *more], width


def _widths(config: Any) -> tuple[int, ...]:
    """Hidden layers of an MLP."""
    widths: tuple[int, ...] = config.flat_arch if config.net_arch is None else config.net_arch
    return widths


def _hidden(
    widths: Sequence[int],
    n_in: int,
    activation: str,
    init: Init,
    generators: Sequence[torch.Generator],
) -> tuple[list[nn.Module], int]:
    """Linear layers, each with its activation, and the width of the last."""
    layers: list[nn.Module] = []
    for n_out in widths:
        linear = BatchedLinear(len(generators), n_in, n_out, init=init, generators=generators)
        layers += [linear, ACTIVATIONS[activation]()]
        n_in = n_out
    return layers, n_in
