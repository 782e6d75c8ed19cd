"""Networks of action values, plain or dueling, and their passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perennial.agents.aside import Aside
from perennial.agents.config import DQNConfig
from perennial.agents.convnets import build_net
from perennial.agents.convolved import Convolved
from perennial.agents.dueling import Dueling
from perennial.agents.networks import WrittenOut
from perennial.agents.passes import Passes, passes
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.copies import Init
from perennial.plasticity.units import WEIGHTED

NET = "q_net"  # what metrics call it


def build_q_net(
    config: DQNConfig,
    shape: Sequence[int],
    actions: int,
    outputs: int,
    generators: Sequence[torch.Generator],
) -> nn.Module:
    """Network [S, B, *shape] -> [S, B, actions * outputs], with the methods that change networks.

    outputs: m per action, of the value loss. Weights are drawn as SB3's are: torch's default.
    """
    init = Init("torch-default", bias="torch-default")
    plain = build_net(config, shape, actions * outputs, init, init, generators)
    net = Dueling(plain, outputs, generators) if config.dueling else plain
    return rewrite(net, config.interventions, generators=generators)


def layer_keys(net: nn.Module) -> dict[str, str]:
    """What metrics call each layer: `q_net/0`, `q_net/1`, ..."""
    layers = (name for name, module in net.named_modules() if isinstance(module, WEIGHTED))
    return {name: f"{NET}/{k}" for k, name in zip(itertools.count(), layers)}


def q_passes(net: nn.Module, aside: Aside, learns: bool = True) -> Passes | Convolved:
    """The fastest training passes that `net` allows."""
    return Convolved(net, aside) if Convolved.fits(net) else passes(net, learns)


def look(through: Passes | Convolved, x: Tensor) -> Tensor:
    """Output [S, B, n * m] of a forward that nothing is learned from and no method sees."""
    if isinstance(through, Convolved):
        return through.look(x)
    if isinstance(through, WrittenOut):
        return through.forward(x)
    with torch.no_grad():
        return through.net(x)  # type: ignore[no-any-return]
