"""Convolutions over copies, and the networks on pixels."""

from __future__ import annotations

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perennial.agents.by_copy import ByCopy
from perennial.agents.convnets import build_net, observation_shape
from perennial.agents.networks import Autograd
from perennial.plasticity import BatchedConv2d, Init, find_units, rewrite

CONFIG = SimpleNamespace(
    agent="ppo", env="Some-v0", net_arch=None, flat_arch=(7, 5), activation="relu"
)


def generators(seeds: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_batched_convolution_equals_convolutions(copies: int, bias: bool) -> None:
    init = Init("orthogonal", 2**0.5, bias="torch-default")
    shape = dict(kernel=3, stride=2, padding=1, bias=bias, init=init, dtype=torch.float64)
    layer = BatchedConv2d(copies, 2, 5, generators=generators(range(copies)), **shape)
    x = torch.randn(copies, 4, 2, 8, 9, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    direction = torch.randn_like(y)
    y.backward(direction)
    together = [x.grad, *(p.grad for p in layer.parameters())]
    for c in range(copies):
        alone = BatchedConv2d(1, 2, 5, generators=generators(range(c, c + 1)), **shape)
        leaf = x[c : c + 1].detach().requires_grad_()
        assert torch.equal(alone(leaf), y[c : c + 1])
        alone(leaf).backward(direction[c : c + 1])
        for mine, theirs in zip([leaf, *alone.parameters()], together, strict=True):
            torch.testing.assert_close(mine.grad, theirs[c : c + 1], rtol=0, atol=1e-13)
        b = None if layer.bias is None else layer.bias[c]
        plainly = F.conv2d(x[c], layer.weight[c], b, 2, 1)
        torch.testing.assert_close(y[c], plainly, rtol=0, atol=1e-13)


def test_grouped_form_is_the_same() -> None:
    layer = BatchedConv2d(3, 2, 4, 3, stride=2, dtype=torch.float64)
    x = torch.randn(3, 5, 2, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(layer._grouped(x), layer(x), rtol=0, atol=1e-14)


def test_nature_cnn_has_the_published_shape_and_reads_bytes() -> None:
    net = build_net(CONFIG, (4, 84, 84), 6, Init(), Init(), generators(range(2)))
    shapes = [tuple(m.weight.shape[1:]) for m in net if hasattr(m, "weight")]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (6, 512)]
    x = torch.randint(0, 256, (2, 3, 4, 84, 84), dtype=torch.uint8)
    assert net(x).shape == (2, 3, 6)
    torch.testing.assert_close(net(x), net(x.float()))
    torch.testing.assert_close(net(x), net[1:](x.float() / 255))
    assert len(net.state_dict()) == 10  # every tensor has a copies axis


def test_small_images_and_widths() -> None:
    net = build_net(CONFIG, (1, 10, 10), 3, Init(), Init(), generators(range(1)))
    shapes = [tuple(m.weight.shape[1:]) for m in net if hasattr(m, "weight")]
    assert shapes == [(16, 1, 3, 3), (128, 1024), (3, 128)]
    asked = SimpleNamespace(**vars(CONFIG) | {"net_arch": (9, 8), "activation": "tanh"})
    net = build_net(asked, (1, 10, 10), 3, Init(), Init(), generators(range(1)))
    assert [m.weight.shape[1] for m in net if hasattr(m, "weight")] == [16, 9, 8, 3]
    assert sum(isinstance(m, nn.Tanh) for m in net) == 3
    flat = list(build_net(CONFIG, (4,), 2, Init(), Init(), generators(range(1))))
    assert [m.weight.shape[1] for m in flat[::2]] == [7, 5, 2]


@pytest.mark.parametrize("methods", [[], ["layer-norm", "crelu"]], ids=["plain", "rewritten"])
def test_passes_copy_by_copy_equal_those_of_all(methods: list[str]) -> None:
    net = build_net(CONFIG, (2, 12, 12), 3, Init(), Init(), generators(range(3))).double()
    rewrite(net, methods, generators=generators(range(3)))
    x = torch.randint(0, 256, (3, 5, 2, 12, 12), dtype=torch.uint8)
    direction = torch.randn(3, 5, 3, dtype=torch.float64)
    units = find_units(net, x[:, :1])
    assert ByCopy.fits(net)
    slow, fast = Autograd(net), ByCopy(net)
    expected = slow.forward(x)
    slow.backward(direction)
    gradients = [p.grad.clone() for p in net.parameters()]
    features = [site.features.clone() for site in units]
    for site in units:
        site.raw = None
    for _ in range(2):  # the second time over what the first has left
        assert torch.allclose(fast.forward(x, units.record), expected, rtol=0, atol=1e-12)
        fast.backward(direction)
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=0, atol=1e-11)
    for site, seen in zip(units, features, strict=True):
        assert torch.allclose(site.features, seen, rtol=0, atol=1e-12)
    with torch.no_grad():  # the parts are views: what moves the network moves them
        next(net.parameters()).mul_(2)
    assert torch.allclose(fast.forward(x), net(x), rtol=0, atol=1e-12)


def test_observations_that_fit_and_one_line_for_others() -> None:
    box = gym.spaces.Box
    assert observation_shape(CONFIG, box(-1, 1, (3,))) == (3,)
    assert observation_shape(CONFIG, box(0, 255, (4, 84, 84), np.uint8)) == (4, 84, 84)
    for space, words in [
        (box(0, 255, (96, 96, 3), np.uint8), "channels first"),
        (box(0, 1, (3, 84, 84)), "uint8"),
        (gym.spaces.Discrete(3), "flat Box"),
        (box(-1, 1, (3, 3)), "another env"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            observation_shape(CONFIG, space)
        assert "\n" not in str(error.value)
