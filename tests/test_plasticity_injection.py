"""Plasticity injection against its oracles and against heads written out."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from perennial.agents.networks import MLP, Autograd, WrittenOut
from perennial.agents.passes import passes
from perennial.plasticity import BatchedAdam, BatchedLinear, Init, attach, find_units, make
from perennial.plasticity.norms import BatchedLayerNorm

from .nets import OPTIMIZERS, batch, batched, copies_of, plain, put_to, same, train, weights


class Shared(nn.Module):
    """An encoder, a hidden layer that two heads read, functional nonlinearities and norms."""

    def __init__(self, copies: int = 0) -> None:
        super().__init__()
        if copies:
            self.encoder, self.hidden = BatchedLinear(copies, 3, 8), BatchedLinear(copies, 8, 6)
            self.norm: nn.Module = BatchedLayerNorm(copies, 6)
            self.one, self.two = BatchedLinear(copies, 6, 2), BatchedLinear(copies, 6, 1)
        else:
            self.encoder, self.hidden = nn.Linear(3, 8), nn.Linear(8, 6)
            self.norm = nn.LayerNorm(6)
            self.one, self.two = nn.Linear(6, 2), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.hidden(torch.tanh(self.encoder(x)))))
        return torch.cat([self.one(h), self.two(h)], -1)


class Image(nn.Module):
    """Rows of 3 numbers as 1x5x5 images; convolution, pooling, flattening inside the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 2), nn.Conv2d(4, 3, 2)
        self.out = nn.Linear(3 * 1 * 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        image = torch.cat([x, x.square(), x[..., :1] - x, x * x.flip(-1)], -1)
        image = torch.cat([image, image, image[..., :1]], -1).unflatten(-1, (1, 5, 5))
        h = torch.relu(self.second(torch.relu(self.first(image))))
        return self.out(torch.max_pool2d(h, 2).flatten(1))


NETS = {
    "plain": plain,
    "batched": lambda: batched(2),
    "shared": lambda: Shared().double(),
    "shared batched": lambda: Shared(2).double(),
    "image": lambda: Image().double(),
}


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS["batched" if copies_of(net) else "adam"](list(net.parameters()))


@pytest.mark.parametrize("kind", NETS)
def test_predictions_and_encoder_gradients_are_unchanged_at_injection(kind: str) -> None:
    torch.manual_seed(0)
    net = NETS[kind]()
    optimizer = optimizer_of(net)
    units = find_units(net, batch(0, copies_of(net)))
    handle = attach("injection:every=0,change=true", units, optimizer)
    method = handle.interventions["injection"]
    train(net, optimizer, range(4))
    x, before = batch(9, copies_of(net)), weights(net)

    def outcome() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        output = net(x)
        output.square().sum().backward()
        gradient = next(net.parameters()).grad
        assert gradient is not None
        return output.detach(), gradient.clone()

    output, gradient = outcome()
    handle.on_change()
    assert torch.equal(outcome()[0], output)  # live - twin is exactly 0
    torch.testing.assert_close(outcome()[1], gradient, rtol=1e-12, atol=1e-14)
    encoder = 2
    assert same(weights(net)[:encoder], before[:encoder])
    live = [(p, q) for p, q in zip(weights(net)[encoder:], before[encoder:], strict=True)]
    assert all(not torch.equal(p, q) for p, q in live if p.ndim > 1 + bool(copies_of(net)))
    for p in list(net.parameters())[encoder:]:
        assert not any(v.any() for v in optimizer.state[p].values())
    assert optimizer.state[next(net.parameters())]["exp_avg"].any()

    frozen = {name: value.clone() for name, value in method.frozen.named_buffers()}
    train(net, optimizer, range(4, 8))
    assert not torch.equal(net(x), output)
    for name, value in method.frozen.named_buffers():
        assert torch.equal(value, frozen[name])
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == set(net.parameters())
    assert not list(method.parameters())
    assert sum(p.numel() for p in trained) == sum(q.numel() for q in before)


def functional(net: nn.Module, head: list[Tensor], z: Tensor) -> Tensor:
    """The last two layers of `plain` with given weights."""
    return torch.relu(z @ head[0].mT + head[1]) @ head[2].mT + head[3]


def test_training_is_that_of_the_heads_written_out() -> None:
    """theta, live and twin as plain tensors: the same weights after many steps, injected twice."""
    net = plain()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    handle = put_to(net, "injection:every=5,times=2", optimizer)
    method = handle.interventions["injection"]
    train(net, optimizer, range(5))
    for event in range(2):
        encoder = [p.detach().clone().requires_grad_() for p in list(net.parameters())[:2]]
        live = [p.detach().clone().requires_grad_() for p in list(net.parameters())[2:]]
        frozen = [
            [theta[0].clone() for theta, _ in pairs] + [twin[0].clone() for _, twin in pairs]
            for pairs in (method.frozen.pairs(place) for place in range(2, 6))
        ]
        assert all(torch.equal(p, f[2 + event]) for p, f in zip(live, frozen, strict=True))
        other = torch.optim.Adam(encoder + live, lr=0.01)
        for p, q in zip(encoder, list(net.parameters())[:2], strict=True):  # encoder's is kept
            other.state[p] = copy.deepcopy(optimizer.state[q])
        for step in range(5, 9):
            x = batch(step)
            z = torch.relu(x @ encoder[0].mT + encoder[1])
            output = functional(net, live, z)
            for k in range(2):
                output = output + functional(net, [f[k] for f in frozen], z)
                output = output - functional(net, [f[2 + k] for f in frozen], z)
            other.zero_grad()
            (output - x.sum(-1, keepdim=True)).square().mean((-1, -2)).sum().backward()
            other.step()
        train(net, optimizer, range(5, 9))
        for p, q in zip(net.parameters(), encoder + live, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        train(net, optimizer, range(9, 10))  # the step of the second event
    assert handle.interventions["injection"].events.tolist() == [2]


def test_a_linear_head_folds_exactly() -> None:
    """theta + live - twin with live trained by a fresh Adam, against depth=1."""
    net = plain()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    put_to(net, "injection:every=5,depth=1", optimizer)
    train(net, optimizer, range(5))
    encoder = [p.detach().clone().requires_grad_() for p in list(net.parameters())[:4]]
    theta = [p.detach().clone() for p in list(net.parameters())[4:]]
    twin = [torch.randn_like(p) for p in theta]
    live = [p.clone().requires_grad_() for p in twin]
    other = torch.optim.Adam(encoder + live, lr=0.01)
    for p, q in zip(encoder, list(net.parameters())[:4], strict=True):
        other.state[p] = copy.deepcopy(optimizer.state[q])
    for step in range(5, 10):
        x = batch(step)
        z = torch.relu(torch.relu(x @ encoder[0].mT + encoder[1]) @ encoder[2].mT + encoder[3])
        w, b = (t + p - q for t, p, q in zip(theta, live, twin, strict=True))
        other.zero_grad()
        (z @ w.mT + b - x.sum(-1, keepdim=True)).square().mean((-1, -2)).sum().backward()
        other.step()
    train(net, optimizer, range(5, 10))
    folded = [t + p - q for t, p, q in zip(theta, live, twin, strict=True)]
    for p, q in zip(net.parameters(), encoder + folded, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "shared batched"])
def test_state_travels_with_the_handle(kind: str) -> None:
    results = []
    for stop in (False, True):
        torch.manual_seed(0)
        net = NETS[kind]()
        optimizer = optimizer_of(net)
        units = find_units(net, batch(0, copies_of(net)))
        handle = attach("injection:every=3,times=2", units, optimizer)
        train(net, optimizer, range(4))
        if stop:
            state = copy.deepcopy((net.state_dict(), optimizer.state_dict(), handle.state_dict()))
            net = NETS[kind]()
            optimizer = optimizer_of(net)
            net.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            units = find_units(net, batch(0, copies_of(net)))
            handle = attach("injection:every=3,times=2", units, optimizer)
            handle.load_state_dict(state[2])
        train(net, optimizer, range(4, 8))
        results.append([*weights(net), net(batch(1, copies_of(net))).detach()])
    assert same(*results)


def test_detaching_copying_and_pickling_keep_what_the_network_computes() -> None:
    net = plain()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    handle = put_to(net, "injection:every=3", optimizer)
    train(net, optimizer, range(5))
    x = batch(1)
    output = net(x).detach()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), output)
        train(other, OPTIMIZERS["adam"](list(other.parameters())), range(3))
        assert torch.equal(net(x), output)
    handle.detach()
    assert torch.equal(net(x), output)
    units = find_units(net, x)  # the probe looks through the heads
    assert [site.n for site in units] == [16, 16]
    again = attach("injection:every=3", units, optimizer)
    assert torch.equal(net(x), output)  # taken over
    assert len(net[2]._forward_hooks) == 1
    train(net, optimizer, range(5, 9))  # once is enough: no second injection
    assert again.interventions["injection"].events.tolist() == [1]


def test_other_methods_see_the_live_rows_alone() -> None:
    net = plain()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    units = find_units(net, batch(0))
    attach(["injection:every=2", "cbp:rate=0.1,maturity=1"], units, optimizer)
    train(net, optimizer, range(5))
    assert [site.activation.shape for site in units] == [(1, 8, 16), (1, 8, 16)]
    x = batch(4)
    net(x)
    with torch.no_grad():
        z = torch.relu(net[0](x))
    live = torch.relu(z @ net[2].weight.mT + net[2].bias)
    torch.testing.assert_close(units.sites[1].activation[0], live)


def test_targets_get_the_same_head() -> None:
    net, target = plain(0), plain(1)
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    put_to(net, "injection:every=2", optimizer, targets=[target])
    train(net, optimizer, range(2))
    with torch.no_grad():
        for p, q in list(zip(target.parameters(), net.parameters(), strict=True))[:2]:
            p.copy_(q)
    assert torch.equal(target(batch(1)), net(batch(1)))
    train(net, optimizer, range(2, 3))
    assert not torch.equal(target(batch(1)), net(batch(1)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.out(h + torch.relu(self.block(h)))


def test_heads_that_are_no_closed_part_fold_at_a_smaller_depth() -> None:
    net = Residual().double()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    handle = put_to(net, "injection:every=2", optimizer)
    before = net(batch(1))
    train(net, optimizer, range(2))
    assert not any(v.any() for v in optimizer.state[net.out.weight].values())
    assert optimizer.state[net.block.weight]["exp_avg"].any()
    assert not list(handle.interventions["injection"].frozen.buffers())
    assert not torch.equal(net(batch(1)), before)


def test_a_part_by_name_and_one_line_for_a_wrong_one() -> None:
    net = Shared(2).double()
    units = find_units(net, batch(0, 2))
    optimizer = BatchedAdam(net.parameters(), lr=0.01)
    attach("injection:every=1,net=two,depth=1", units, optimizer)
    train(net, optimizer, range(1))
    assert not any(v.any() for v in optimizer.state[net.two.weight].values())
    assert optimizer.state[net.one.weight]["exp_avg"].any()
    with pytest.raises(ValueError, match=r"injection: no part of the model is named 'too'"):
        attach("injection:net=too", units, BatchedAdam(net.parameters(), lr=0.01))
    with pytest.raises(ValueError, match=r"times=0 must be"):
        make("injection:times=0")


def test_injected_networks_of_our_agents_run_as_modules() -> None:
    """The passes written out and the numpy forward know no hooks."""
    generators = [torch.Generator().manual_seed(0)]
    net = MLP(1, (3, 16, 16, 2), "relu", Init(), Init(), generators).double()
    assert WrittenOut.fits(net)
    optimizer = BatchedAdam(net.parameters(), lr=0.01)
    put_to(net, "injection:every=1", optimizer)
    assert isinstance(passes(net), Autograd)
    train(net, optimizer, range(2))
    ours = passes(net)
    assert torch.equal(ours.forward(batch(3, 1), None), net(batch(3, 1)))
