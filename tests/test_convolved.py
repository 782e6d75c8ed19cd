"""Written-out passes of CNNs equal autograd's, on one thread and on two, for one seed and more."""

import pytest
import torch
from torch import nn

from perennial.agents.aside import Aside
from perennial.agents.config import build_config
from perennial.agents.convolved import Convolved
from perennial.agents.networks import Autograd
from perennial.agents.q_network import build_q_net

NATURE, MINATAR = (4, 84, 84), (4, 10, 10)


def net_of(copies=1, shape=(3, 36, 40), **given) -> nn.Module:
    config = build_config("dqn", given={"env": "CartPole-v1", **given})
    generators = [torch.Generator().manual_seed(s) for s in range(copies)]
    return build_q_net(config, shape, 5, 2, generators).double()


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(
    "shape, given",
    [((3, 36, 40), {}), ((3, 36, 40), {"net_arch": (12, 7)}),
     ((1, 10, 11), {"net_arch": (8,)}), ((3, 36, 40), {"net_arch": (9,), "dueling": True})],
)  # fmt: skip
def test_passes_equal_autograd(shape, given, copies, threaded):
    net = net_of(copies, shape, **given)
    assert Convolved.fits(net)
    written, auto = Convolved(net, Aside(threaded)), Autograd(net)
    x = torch.randint(0, 256, (copies, 7, *shape), dtype=torch.uint8)
    other = torch.randint(0, 256, (copies, 3, *shape), dtype=torch.uint8)
    gradient = torch.randn(copies, 7, 10).double()
    expected = auto.forward(x)
    auto.backward(gradient)
    gradients = [p.grad.clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad.fill_(9.0)  # what was there before counts for nothing
    seen = {}
    assert torch.allclose(written.forward(x, seen.__setitem__), expected, atol=1e-12)
    assert torch.allclose(written.look(other), net(other), atol=1e-12)  # in between
    written.backward(gradient)
    for p, g in zip(net.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-12)
    assert torch.allclose(written.look(x[:, :1]), expected[:, :1], atol=1e-12)
    inputs = {}
    layers = [*written.convolutions, *(m for stream in written.streams for m in stream)]
    for layer in (net, *layers):
        layer.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0]))
    net(x)
    assert seen.keys() == inputs.keys()
    for layer, value in inputs.items():
        assert seen[layer].shape == value.shape
        assert torch.allclose(seen[layer], value, atol=1e-12)


def test_what_does_not_fit():
    """Norms, deep dueling nets, unknown nonlinearities and hooks are left to autograd."""
    for given in (
        {"plasticity": ["layer-norm"]},
        {"plasticity": ["crelu"]},
        {"dueling": True, "net_arch": (8, 8)},
        {"activation": "tanh"},
    ):
        assert not Convolved.fits(net_of(**given)), given
    assert not Convolved.fits(net_of(shape=(4,)))
    net = net_of()
    net[-1].register_forward_hook(lambda *_: None)
    assert not Convolved.fits(net)


def gradients_of(net, x, gradient, threaded=False):
    """Output of float32 passes, and all gradients."""
    passes = Convolved(net, Aside(threaded))
    output = passes.forward(x)
    passes.backward(gradient)
    return [output, *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("shape", [NATURE, MINATAR])
def test_threads_and_company_in_single_precision(shape):
    """Two runs are bitwise the same and so is a seed among others; a second thread, and autograd,
    differ by rounding."""
    together, alone = net_of(2, shape).float(), net_of(1, shape).float()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 5, *shape), dtype=torch.uint8, generator=generator)
    gradient = torch.randn(2, 5, 10, generator=generator)
    auto = Autograd(together)
    expected = [auto.forward(x)]
    auto.backward(gradient)
    expected += [p.grad.clone() for p in together.parameters()]
    for threaded in (False, True):
        found = gradients_of(together, x, gradient, threaded)
        again = gradients_of(together, x, gradient, threaded)
        single = gradients_of(alone, x[:1], gradient[:1], threaded)
        for a, b, c, e in zip(found, again, single, expected, strict=True):
            assert torch.equal(a, b) and torch.equal(a[:1], c)
            assert torch.allclose(a, e, atol=1e-5 * float(e.abs().max()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", range(3))
def test_what_is_no_number_is_not_hidden(layer, value):
    """It is where it is in autograd's passes."""
    net = net_of(1, NATURE).float()
    x = torch.randint(1, 256, (1, 2, *NATURE), dtype=torch.uint8)
    with torch.no_grad():
        net[1 + 2 * layer].weight[0, 3, 0, 1, 2] = value
    auto = Autograd(net)
    expected = [auto.forward(x)]
    auto.backward(torch.ones(1, 2, 10))
    expected += [p.grad.clone() for p in net.parameters()]
    found = gradients_of(net, x, torch.ones(1, 2, 10))
    assert not found[0].isfinite().any()
    for a, e in zip(found, expected, strict=True):
        finite = e.isfinite()
        assert torch.equal(a.isfinite(), finite)
        assert torch.allclose(a[finite], e[finite], rtol=1e-4, atol=1e-4)
