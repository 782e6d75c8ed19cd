"""The written-out passes and gradients against autograd, loop against batch."""

import copy as copying
import itertools
import threading

import gymnasium as gym
import numpy as np
import pytest
import torch

from perennial.agents.acting import Acting
from perennial.agents.aside import Aside
from perennial.agents.blas import product
from perennial.agents.compiled_mlp import CompiledMLP
from perennial.agents.distributions import Categorical, Gaussian, surrogate_losses, value_gradient
from perennial.agents.networks import MLP, Autograd, WrittenOut
from perennial.agents.passes import passes
from perennial.agents.streams import Streams, torch_generator
from perennial.plasticity import find_units, kernels
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.copies import BatchedLinear, Init
from perennial.plasticity.norms import BatchedLayerNorm


def network(seeds, activation="relu", methods=()):
    generators = [torch_generator(s, "init") for s in seeds]
    init = Init("orthogonal", 2**0.5)
    net = MLP(len(seeds), (5, 16, 12, 3), activation, init, init, generators)
    for module in rewrite(net, methods).modules():
        if isinstance(module, BatchedLayerNorm) and module.weight is not None:
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return net.double()


NORMS = ["layer-norm", "layer-norm:affine=false"]


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(
    ("activation", "methods"), [("relu", ()), ("tanh", ()), *(("relu", norm) for norm in NORMS)]
)
def test_written_out_passes_equal_autograd(copies, activation, methods):
    torch.manual_seed(0)
    net = network(range(copies), activation, methods)
    x, gradient = torch.randn(copies, 7, 5).double(), torch.randn(copies, 7, 3).double()
    seen = []
    fast = passes(net)
    assert isinstance(fast, WrittenOut)
    for _ in range(2):  # buffers are reused: nothing may be left over from the first time
        out = fast.forward(x, lambda layer, inputs: seen.append((layer, inputs.clone()))).clone()
        fast.backward(gradient)
    ours = {name: p.grad.clone() for name, p in net.named_parameters()}
    slow = Autograd(net)
    assert torch.allclose(slow.forward(x, None), out, atol=1e-12)
    slow.backward(gradient)
    for name, p in net.named_parameters():
        assert torch.allclose(p.grad, ours[name], atol=1e-12), name
    fast.forward(x)
    d_input = fast.input_gradient(gradient, 5)
    slow.forward(x, wants_input=True)
    assert torch.allclose(slow.input_gradient(gradient, 5), d_input, atol=1e-12)
    for name, p in net.named_parameters():
        assert torch.allclose(p.grad, ours[name], atol=1e-12) or not p.grad.any(), name
    assert [layer for layer, _ in seen[:3]] == [m for m in net if isinstance(m, BatchedLinear)]
    assert torch.equal(seen[0][1], x) and seen[2][1].shape == (copies, 7, 12)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(
    ("activation", "methods"), [("relu", ()), ("tanh", ()), *(("relu", norm) for norm in NORMS)]
)
def test_acting_equals_the_network(copies, activation, methods):
    torch.manual_seed(0)
    net = network(range(copies), activation, methods)
    x = torch.randn(copies, 2, 5).double()
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(Acting(net).forward(x.numpy()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("methods", [(), "layer-norm"])
@pytest.mark.parametrize("copies", [1, 2])
def test_rows_that_ask_for_no_gradient_are_left_out_of_large_products(copies, methods):
    """And gradients by the weights are the same with a second thread."""
    torch.manual_seed(0)
    init = Init("orthogonal", 2**0.5)
    generators = [torch_generator(s, "init") for s in range(copies)]
    net = MLP(copies, (9, 160, 160, 2), "relu", init, init, generators)
    rewrite(net, methods).double()
    x, gradient = torch.randn(copies, 300, 9).double(), torch.randn(copies, 300, 2).double()
    gradient[:, :200:2] = 0.0
    gradient[-1, 100:] = 0.0
    fast, slow = passes(net), Autograd(net)
    assert isinstance(fast, WrittenOut) and fast._large(gradient)
    assert not fast._large(gradient[:, :100])
    for sent in (gradient, gradient[:, :100], torch.zeros_like(gradient)):
        given = x[:, : sent.shape[1]]
        fast.forward(given)
        slow.forward(given, wants_input=True)
        found, expected = fast.input_gradient(sent, 3), slow.input_gradient(sent, 3)
        assert found.shape == (copies, sent.shape[1], 3)
        assert torch.allclose(found, expected, atol=1e-12)
    slow.forward(x)
    slow.backward(gradient)
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    fast.forward(x)
    fast.backward(gradient, Aside(True))
    for name, p in net.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-12), name


def test_passes_of_some_copies_serve_them_alone():
    net = network(range(4))
    x, gradient = torch.randn(4, 7, 5).double(), torch.randn(4, 7, 3).double()
    whole = WrittenOut(net)
    out = whole.forward(x).clone()
    whole.backward(gradient)
    expected = [p.grad.clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad.zero_()
    for only in (slice(0, 1), slice(1, 4)):
        part = WrittenOut(net, only)
        assert torch.allclose(part.forward(x[only]), out[only], atol=1e-12)
        part.backward(gradient[only])
    for p, grad in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "halves", "methods"),
    [
        (Autograd, False, ()),
        *itertools.product((WrittenOut, CompiledMLP), (False, True), [()]),
        *itertools.product((CompiledMLP,), (False, True), NORMS),
    ],
)
@pytest.mark.parametrize("sharing", [1, 2, 4])
def test_passes_laid_out_once_serve_many_calls(kind, halves, methods, sharing):
    """Also of some copies, where several share their inputs, and told to who records."""
    torch.manual_seed(0)
    net = network(range(4), methods=methods)
    expected = Autograd(copying.deepcopy(net))
    cuts = [slice(0, 1), slice(1, 4)] if halves else [None]
    parts = [kind(net, cut) if halves else kind(net) for cut in cuts]
    x, out, gradient = (
        torch.zeros(n, 7, m).double() for n, m in ((4 // sharing, 5), (4, 3), (4, 3))
    )
    d_input, seen = torch.zeros(4, 7, 2).double(), []
    record = None if kind is Autograd else lambda layer, h: seen.append(h.clone())
    steps = []
    for part in parts:
        steps += [part.forward_later(x, out, record), part.backward_later(gradient)]
        steps += [part.forward_later(x, out, None, True)]
        steps += [part.input_gradient_later(gradient, d_input)]
    for _ in range(2):
        x.copy_(torch.randn(x.shape))
        gradient.copy_(torch.randn(gradient.shape))
        seen.clear()
        for step in steps:
            step()
        whole = x.repeat_interleave(sharing, 0)
        assert torch.allclose(out, expected.forward(whole), rtol=0, atol=1e-12)
        expected.backward(gradient)
        for p, q in zip(net.parameters(), expected.net.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-12)
        expected.forward(whole, wants_input=True)
        assert torch.allclose(d_input, expected.input_gradient(gradient, 2), rtol=0, atol=1e-12)
        layers = sum(isinstance(m, BatchedLinear) for m in net)
        for k, part in enumerate(parts if seen else []):
            assert torch.equal(seen[k * layers], whole[part.only])


def test_a_network_is_served_by_loops_where_they_can_and_else_by_tensors(monkeypatch):
    assert type(passes(network([0]))) is CompiledMLP
    assert type(passes(network([0], "tanh"))) is WrittenOut
    assert type(passes(network([0]).half())) is WrittenOut
    found = []
    for loops in (True, False):
        if not loops:
            monkeypatch.setattr(kernels, "ready", lambda *_: False)
        net = network([0, 1])
        served = passes(net)
        assert isinstance(served, CompiledMLP) == loops
        torch.manual_seed(0)
        out = served.forward(torch.randn(2, 9, 5).double()).clone()
        gradient = torch.randn(2, 9, 3).double()
        served.backward(gradient)
        found.append([out, *(p.grad.clone() for p in net.parameters())])
        served.forward(torch.randn(2, 9, 5).double())
        found[-1].append(served.input_gradient(gradient, 2))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_what_is_no_number_goes_through_loops_as_through_tensors():
    found = []
    for kind in (CompiledMLP, WrittenOut):
        served = kind(network([0]))
        x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(1, 4, 5).clone()
        x[0, 1, 2] = torch.nan
        out = served.forward(x).clone()
        served.backward(torch.ones_like(out))
        found.append([out, *(p.grad for p in served.layers[0].parameters())])
    assert found[0][0].isnan().any() and found[0][1].isnan().any()
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@kernels.compiled
def _products(a, b, out, turn_a, turn_b):
    product(a, b, out, turn_a, turn_b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_inside_loops_equal_numpy(dtype):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 6)).astype(dtype), rng.normal(size=(6, 9)).astype(dtype)
    for turn_a in (False, True):
        for turn_b in (False, True):
            out = np.full((4, 9), np.nan, dtype)
            left = np.ascontiguousarray(a.T) if turn_a else a
            right = np.ascontiguousarray(b.T) if turn_b else b
            _products(left, right, out, turn_a, turn_b)
            np.testing.assert_allclose(out, a @ b, rtol=1e-4, atol=1e-6)
    wide = rng.normal(size=(6, 20)).astype(dtype)  # rows apart in memory
    out = np.empty((4, 9), dtype)
    _products(a, wide[:, 11:], out, False, False)
    np.testing.assert_allclose(out, a @ wide[:, 11:], rtol=1e-4, atol=1e-6)


def test_products_without_rows_or_terms_are_zero_and_silent(capfd):
    for rows, inner, columns in ((0, 6, 9), (4, 0, 9), (4, 6, 0)):
        out = np.full((rows, columns), np.nan)
        for turn_a, turn_b in itertools.product((False, True), repeat=2):
            a = np.ones((inner, rows) if turn_a else (rows, inner))
            b = np.ones((columns, inner) if turn_b else (inner, columns))
            _products(a, b, out, turn_a, turn_b)
        assert not out.any()
    net = network([0])
    served = passes(net)
    served.forward(torch.randn(1, 7, 5).double())
    assert not served.input_gradient(torch.zeros(1, 7, 3).double(), 2).any()
    served.forward(torch.randn(1, 1, 5).double())
    served.backward(torch.ones(1, 1, 3).double(), Aside(True))  # one row for two threads
    assert torch.equal(net[4].bias.grad, torch.ones(1, 3).double())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("threaded", [False, True])
def test_errors_of_either_thread_arrive_and_the_next_pair_works(threaded):
    aside = Aside(threaded)

    def fails():
        raise ValueError("on purpose")

    for here, there in ((fails, int), (int, fails)):
        with pytest.raises(ValueError, match="on purpose"):
            aside.pair(here, there)
    assert aside.pair(lambda: 1, lambda: threading.current_thread().name)[0] == 1
    name = aside.pair(int, lambda: threading.current_thread().name)[1]
    assert (name == "aside") == threaded


def test_other_networks_use_autograd():
    net = network([0])
    net.insert(1, torch.nn.LayerNorm(16).double())
    assert isinstance(passes(net), Autograd)


@pytest.mark.parametrize("ent_coef", [0.0, 0.03])
def test_gaussian_gradients_equal_autograd(ent_coef):
    torch.manual_seed(0)
    head = Gaussian(2, gym.spaces.Box(-1, 1, (3,)), -0.3, clip=False).double()
    mean = torch.randn(2, 40, 3).double().requires_grad_()
    actions, advantages = torch.randn(2, 40, 3).double(), torch.randn(2, 40).double()
    normal = torch.distributions.Normal(mean, head.log_std.exp()[:, None])
    log_prob = normal.log_prob(actions).sum(-1)
    old = log_prob.detach() + 0.3 * torch.randn(2, 40).double()
    ratio = (log_prob - old).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(-1)
    entropy = normal.entropy().sum(-1).mean(-1)
    d_mean, d_log_std = torch.autograd.grad((loss - ent_coef * entropy).sum(), [mean, head.log_std])
    step = head.surrogate(mean.detach(), actions, old, advantages, 0.2, ent_coef)
    assert torch.allclose(step.d_output, d_mean, atol=1e-14)
    assert torch.allclose(head.log_std.grad, d_log_std, atol=1e-14)
    parts = surrogate_losses(step.log_ratio, advantages, 0.2)
    assert torch.allclose(parts["policy_gradient_loss"], loss, atol=1e-14)
    assert torch.allclose(step.entropy, entropy, atol=1e-14)
    outside = (ratio < 0.8) | (ratio > 1.2)
    assert torch.allclose(parts["clip_fraction"], outside.double().mean(-1))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_value_gradient_equals_autograd(clip):
    torch.manual_seed(0)
    values = torch.randn(2, 30).double().requires_grad_()
    returns, old = torch.randn(2, 30).double(), values.detach() + 0.2 * torch.randn(2, 30).double()
    predicted = values if clip is None else old + (values - old).clamp(-clip, clip)
    loss = (returns - predicted).square().mean(-1)
    (expected,) = torch.autograd.grad(0.5 * loss.sum(), values)
    rows, gradient = value_gradient(values.detach(), returns, old, clip)
    assert torch.allclose(gradient * 0.5 / 30, expected, atol=1e-14)
    assert torch.allclose(rows.mean(-1), loss, atol=1e-14)


def test_streams_do_not_depend_on_company():
    alone, together = Streams([7], "action"), Streams([3, 7], "action")
    assert (alone.normal(5, 2)[0] == together.normal(5, 2)[1]).all()
    assert (alone.permutations(9, 2)[0] == together.permutations(9, 2)[1]).all()
    assert (alone.normal(5) != Streams([7], "minibatch").normal(5)).any()
    state = together.state(1)
    expected = together.uniform(4)[1]
    other = Streams([7], "action")
    other.load_state(0, state)
    assert (other.uniform(4)[0] == expected).all()
    a, b = network([7]), network([3, 7])
    assert all(torch.equal(p[0], q[1]) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("ent_coef", [0.0, 0.03])
def test_categorical_gradients_equal_autograd(ent_coef):
    torch.manual_seed(0)
    head = Categorical(gym.spaces.Discrete(4))
    logits = torch.randn(2, 40, 4).double().requires_grad_()
    actions, advantages = torch.randint(4, (2, 40, 1)), torch.randn(2, 40).double()
    softmax = torch.distributions.Categorical(logits=logits)
    log_prob = softmax.log_prob(actions[..., 0])
    old = log_prob.detach() + 0.3 * torch.randn(2, 40).double()
    ratio = (log_prob - old).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(-1)
    entropy = softmax.entropy().mean(-1)
    (expected,) = torch.autograd.grad((loss - ent_coef * entropy).sum(), logits)
    step = head.surrogate(logits.detach(), actions, old, advantages, 0.2, ent_coef)
    assert torch.allclose(step.d_output, expected, atol=1e-14)
    assert torch.allclose(step.entropy, entropy) and torch.allclose(head.entropy(logits), entropy)
    assert torch.allclose(head.log_prob(logits, actions), log_prob)


def test_categorical_draws_follow_the_softmax():
    head = Categorical(gym.spaces.Discrete(3, start=5))
    logits = np.log(np.array([0.2, 0.5, 0.3]))
    actions = head.choose(logits, head.noise(Streams([0], "action"), 20_000, 1))
    shares = np.bincount(actions.ravel(), minlength=3) / 20_000
    assert np.abs(shares - [0.2, 0.5, 0.3]).max() < 0.015
    assert head.asked(actions[0, :2]).tolist() == (actions[0, :2].ravel() + 5).tolist()


def test_methods_see_activations_of_learning_passes_alone():
    """Of a network that only autograd serves too: forwards on next observations leave no trace."""
    net = MLP(1, (5, 8, 3), "elu", *[Init("orthogonal", 1.0)] * 2, [torch_generator(0, "init")])
    (site,) = find_units(net, torch.zeros(1, 1, 5))
    learning, looking = passes(net), passes(net, learns=False)
    assert isinstance(learning, Autograd) and isinstance(looking, Autograd)
    x = torch.randn(1, 7, 5)
    out = learning.forward(x)
    seen = site.activation.clone()
    ahead = looking.forward(x + 1.0)
    assert torch.equal(site.activation, seen) and not torch.equal(ahead, out)
    learning.backward(torch.ones_like(out))
    first = net[0].weight.grad.clone()
    learning.forward(x)
    learning.backward(torch.ones_like(out))
    assert first.any() and torch.equal(first, net[0].weight.grad)  # gradients do not add up
