"""reset, head-reset, optimizer-reset against their oracles; events of every such method."""

import copy
import math

import pytest
import torch
from torch import nn

from perennial.plasticity import BatchedAdam, BatchedLinear, Init, attach, find_units
from perennial.plasticity.norms import BatchedLayerNorm

from .nets import OPTIMIZERS, batch, batched, plain, put_to, same, train, weights

NULL = ("reset:every=0", "head-reset:every=0", "optimizer-reset:every=0", "hare-tortoise:every=0")
EVERY = ("reset", "head-reset", "optimizer-reset", "hare-tortoise", "shrink-perturb", "injection")


@pytest.mark.parametrize("spec", [*NULL, "injection:every=0", "shrink-perturb:every=0"])
def test_without_events_training_is_the_same_bit_for_bit(spec: str) -> None:
    results = []
    for specs in ([], [spec]):
        net = plain()
        optimizer = OPTIMIZERS["adam"](list(net.parameters()))
        put_to(net, specs, optimizer)
        before = torch.get_rng_state()
        train(net, optimizer, range(7))
        assert torch.equal(before, torch.get_rng_state())
        results.append(weights(net))
    assert same(*results)


@pytest.mark.parametrize("name", EVERY)
def test_events_draw_nothing_from_torch(name: str) -> None:
    net = plain()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    put_to(net, f"{name}:every=2", optimizer)
    before = torch.get_rng_state()
    train(net, optimizer, range(5))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_after_a_full_reset_training_is_that_of_a_fresh_agent(kind: str) -> None:
    net = batched(1) if kind == "batched" else plain()
    optimizer = OPTIMIZERS[kind](list(net.parameters()))
    put_to(net, "reset:every=5", optimizer)
    train(net, optimizer, range(5))
    fresh = copy.deepcopy(net)
    other = OPTIMIZERS[kind](list(fresh.parameters()))
    train(net, optimizer, range(5, 9))
    train(fresh, other, range(5, 9))
    for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


def test_a_full_reset_draws_as_the_layers_were_initialised() -> None:
    net = nn.Sequential(
        nn.Linear(50, 400), nn.ReLU(), BatchedLinearOfOne(400, 30), nn.Linear(30, 9)
    )
    optimizer = torch.optim.Adam(net.parameters())
    units = find_units(net, torch.zeros(2, 50))
    attach("reset:every=1", units, optimizer)
    first = net[0]
    assert isinstance(first, nn.Linear)
    optimizer.zero_grad()
    net(torch.randn(4, 50)).sum().backward()
    old = first.weight.detach().clone()
    optimizer.step()
    for tensor in (first.weight, first.bias):
        bound = 1 / math.sqrt(50)
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() > 0.95 * bound
        assert abs(float(tensor.detach().mean())) < 4 * bound / math.sqrt(3 * tensor.numel())
    assert float(first.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert float((first.weight.detach() - old).abs().mean()) > 0.3 * bound
    middle = net[2].inner.weight.detach()
    torch.testing.assert_close(middle @ middle.T, 4 * torch.eye(30), rtol=0, atol=1e-5)
    assert float(net[2].inner.bias.detach().abs().max()) == 0  # its init says zeros


class BatchedLinearOfOne(nn.Module):
    """A stock layer that says how it was drawn."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.inner = nn.Linear(n_in, n_out)
        self.inner.init = Init("orthogonal", 2.0)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_two_resets_and_two_seeds_draw_different_weights() -> None:
    net = batched(2, Init("orthogonal"), seeds=[7, 7])
    optimizer = OPTIMIZERS["batched"](list(net.parameters()))
    put_to(net, "reset:every=1", optimizer)
    train(net, optimizer, range(1))
    first = weights(net)
    train(net, optimizer, range(1))
    for p, q in zip(weights(net), first, strict=True):
        if p.ndim == 3:
            assert not torch.equal(p, q)
            assert not torch.equal(p[0], p[1])
            gram = p[0] @ p[0].mT if p.shape[1] <= p.shape[2] else p[0].mT @ p[0]
            torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", ["reset:every=2", "head-reset:every=2,depth=2"])
def test_targets_become_equal_or_stay(spec: str) -> None:
    for keep in (False, True):
        net, target = plain(0), plain(1)
        optimizer = OPTIMIZERS["adam"](list(net.parameters()))
        before = weights(target)
        put_to(net, spec + (",target=keep" if keep else ""), optimizer, targets=[target])
        train(net, optimizer, range(2))
        if keep:
            assert same(weights(target), before)
        elif spec.startswith("reset"):
            assert same(weights(target), weights(net))
        else:
            assert same(weights(target)[:2], before[:2])
            assert same(weights(target)[2:], weights(net)[2:])
            assert weights(target)[2].data_ptr() != net[2].weight.data_ptr()


def test_targets_of_another_structure_are_refused() -> None:
    net, other = plain(), plain(bias=False)
    with pytest.raises(ValueError, match=r"differ in '\d.bias'"):
        put_to(net, "reset", torch.optim.Adam(net.parameters()), targets=[other])


class Policy(nn.Module):
    """Norms, a free parameter, two heads."""

    def __init__(self, copies: int = 0) -> None:
        super().__init__()
        if copies:
            self.features = nn.Sequential(
                BatchedLinear(copies, 3, 8), BatchedLayerNorm(copies, 8), nn.ReLU()
            )
            self.policy, self.value = BatchedLinear(copies, 8, 2), BatchedLinear(copies, 8, 1)
        else:
            self.features = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.policy, self.value = nn.Linear(8, 2), nn.Linear(8, 1)
        self.log_std = nn.Parameter(torch.full((copies, 2) if copies else (2,), -0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.features(x)
        return torch.cat([self.policy(h) * self.log_std.exp().mean(), self.value(h)], -1)


@pytest.mark.parametrize("copies", [0, 2])
def test_norms_and_free_parameters_return_to_the_start(copies: int) -> None:
    net = Policy(copies)
    kind = BatchedAdam if copies else torch.optim.Adam
    optimizer = kind(net.parameters(), lr=0.1)
    x = torch.randn(*((copies,) if copies else ()), 16, 3)
    attach("reset:every=4", find_units(net, x), optimizer)
    norm = net.features[1]
    for step in range(4):
        if step == 3:
            assert not torch.equal(norm.weight, torch.ones_like(norm.weight))
            assert not torch.equal(net.log_std, torch.full_like(net.log_std, -0.5))
        optimizer.zero_grad()
        (net(x) - 1).square().sum().backward()
        optimizer.step()
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
    assert torch.equal(net.log_std, torch.full_like(net.log_std, -0.5))
    if not copies:
        assert torch.equal(norm.running_mean, torch.zeros(8))
        assert torch.equal(norm.running_var, torch.ones(8))
        assert int(norm.num_batches_tracked) == 0


@pytest.mark.parametrize("kind", ["adam", "sgd", "batched"])
def test_a_head_reset_leaves_the_features(kind: str) -> None:
    net = batched(1) if kind == "batched" else plain()
    optimizer = OPTIMIZERS[kind](list(net.parameters()))
    twin = copy.deepcopy(net)
    other = OPTIMIZERS[kind](list(twin.parameters()))
    put_to(net, "head-reset:every=5", optimizer)
    train(net, optimizer, range(5))
    train(twin, other, range(5))
    assert same(weights(net)[:-2], weights(twin)[:-2])
    head = weights(net)[-2]
    assert not torch.equal(head, weights(twin)[-2])
    assert float(head.abs().max()) <= 0.25  # 1 / sqrt(16)
    x = batch(0, 1 if kind == "batched" else None)
    assert torch.equal(net[:-1](x), twin[:-1](x))
    for name, value in optimizer.state[net[-1].weight].items():
        assert not value.any(), name
    for name, value in optimizer.state[net[0].weight].items():
        assert torch.equal(value, other.state[twin[0].weight][name])


def test_head_variants_of_the_published_supervised_runs() -> None:
    net = plain()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    handle = put_to(net, "head-reset:every=0,change=true,to=zero,optimizer=keep", optimizer)
    train(net, optimizer, range(3))
    moments = optimizer.state[net[-1].weight]["exp_avg"].clone()
    assert net[-1].weight.any()
    handle.on_change()
    assert not net[-1].weight.any()
    assert not net[-1].bias.any()
    assert torch.equal(optimizer.state[net[-1].weight]["exp_avg"], moments)
    assert moments.any()


@pytest.mark.parametrize("spec", ["head-reset:every=1,net=value", "reset:every=1,net=value"])
def test_one_part_by_name(spec: str) -> None:
    net = Policy(2)
    optimizer = BatchedAdam(net.parameters(), lr=0.0)
    x = torch.randn(2, 16, 3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    attach(spec, find_units(net, x), optimizer)
    net(x).sum().backward()
    optimizer.step()
    changed = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"value.weight"}  # its bias is zero at birth
    with pytest.raises(ValueError, match=r"no part .* 'valeu'; did you mean 'value'"):
        wrong = spec.replace("value", "valeu")
        attach(wrong, find_units(net, x), BatchedAdam(net.parameters(), lr=0.0))


@pytest.mark.parametrize("name", EVERY)
def test_copies_that_stand_still_keep_every_bit(name: str) -> None:
    net = batched(3)
    optimizer = BatchedAdam(net.parameters(), lr=0.01)
    units = find_units(net, batch(0, 3))
    handle = attach(f"{name}:every=2", units, optimizer, hooks=False)
    for step in range(3):
        active = [True, step != 1, True]  # copy 1 has its event one step later
        before, moments = weights(net), optimizer.state_of(1)
        optimizer.zero_grad()
        x = batch(step, 3)
        net(x).square().sum().backward()
        handle.before_step(active)
        optimizer.step(active)
        handle.after_step(active)
        if step == 1:
            assert all(torch.equal(p[1], q[1]) for p, q in zip(weights(net), before, strict=True))
            assert all(torch.equal(v, moments[k]) for k, v in optimizer.state_of(1).items())
    assert handle.interventions[name].events.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", EVERY)
def test_a_copy_among_others_is_the_copy_alone(name: str) -> None:
    together, alone = batched(3), batched(1, seeds=[2])
    for net, seeds in ((together, [5, 9, 4]), (alone, [4])):
        optimizer = BatchedAdam(net.parameters(), lr=0.01)
        put_to(net, f"{name}:every=2", optimizer, seeds=seeds)
        train(net, optimizer, range(5))
    for p, q in zip(weights(together), weights(alone), strict=True):
        torch.testing.assert_close(p[2], q[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_events_are_counted_limited_and_told(name: str) -> None:
    net = plain()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    limited = name != "hare-tortoise"
    spec = f"{name}:every=2,change=true" + (",times=3" if limited else "")
    handle = put_to(net, spec, optimizer)
    train(net, optimizer, range(1))
    events = handle.interventions[name].events
    seen = []
    for step in range(1, 7):
        train(net, optimizer, range(step, step + 1))
        if step == 2:
            handle.on_change()
        seen.append(int(events))
    assert seen == ([1, 2, 3, 3, 3, 3] if limited else [1, 2, 3, 3, 4, 4])


@pytest.mark.parametrize("kind", ["adam", "fused", "batched"])
def test_after_an_optimizer_reset_the_step_is_the_sign_of_the_gradient(kind: str) -> None:
    net = batched(1) if kind == "batched" else plain()
    optimizer = OPTIMIZERS[kind](list(net.parameters()))
    put_to(net, "optimizer-reset:every=6", optimizer)
    for _ in range(2):
        train(net, optimizer, range(6))
        before = weights(net)
        train(net, optimizer, range(20, 21))
        for p, q in zip(net.parameters(), before, strict=True):
            assert p.grad is not None
            clear = p.grad.abs() > 1e-4
            torch.testing.assert_close(
                (p - q)[clear], -0.01 * p.grad.sign()[clear], rtol=1e-3, atol=0
            )
        train(net, optimizer, range(5))  # to the next event


def test_adam_rel_restarts_the_step_count_alone() -> None:
    p = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    net = nn.Linear(1, 1, bias=False).double()
    net.weight = p
    optimizer = torch.optim.Adam([p], lr=1.0, eps=0.0)
    units = find_units(net, torch.zeros(1, 1, dtype=torch.float64))
    attach("optimizer-reset:every=9000,what=step", units, optimizer)
    p.grad = torch.ones_like(p)
    for _ in range(9000):
        optimizer.step()
    before = float(p.detach())
    optimizer.step()
    expected = 1 / (1 - 0.9) / math.sqrt(1 / (1 - 0.999))  # averages are 1: 0.316
    assert before - float(p.detach()) == pytest.approx(expected, rel=1e-4)


def test_optimizers_without_a_step_count_are_refused_in_one_line() -> None:
    net = plain()
    with pytest.raises(ValueError, match="SGD corrects nothing by a step count; take what=all"):
        put_to(net, "optimizer-reset:what=step", OPTIMIZERS["sgd"](list(net.parameters())))


@pytest.mark.parametrize("reset", ["head-reset:every=30", "optimizer-reset:every=30"])
def test_recycled_units_and_resets_share_an_optimizer(reset: str) -> None:
    """Units that cbp renewed are older than a head that was reset: no negative ages, no NaN."""
    net = batched(2)
    optimizer = BatchedAdam(net.parameters(), lr=0.01)
    handle = put_to(net, ["cbp:rate=0.05,maturity=3", reset], optimizer)
    train(net, optimizer, range(30))
    assert int(handle.counts()["cbp"].sum()) > 10
    before = weights(net)
    train(net, optimizer, range(30, 31))
    head, old = net[-1].weight, before[-2]  # (biases also take over what renewed units gave)
    assert head.grad is not None
    moved = (head.grad.abs() > 1e-4) & (head != 0)  # 0: cbp renewed the unit in this very step
    expected = -0.01 * head.grad.sign()[moved]
    assert moved.sum() > 20
    torch.testing.assert_close((head - old)[moved], expected, rtol=1e-3, atol=0)
    train(net, optimizer, range(31, 60))
    assert all(torch.isfinite(p).all() for p in net.parameters())


STALE = {
    "cbp": ("cbp:maturity=3,rate=0.2,count=accumulate", ("age", "utility", "mean", "budget")),
    "redo": ("redo:every=50,batches=50", ("score",)),
    "regrama": ("regrama:every=50,batches=50", ("score", "seen")),
    "snr": ("snr:initial=2,check=4,every=5", ("silent", "silences", "tau")),
}


@pytest.mark.parametrize("name", STALE)
@pytest.mark.parametrize("net", ["all", "part"])
def test_what_was_gathered_about_weights_goes_with_them_in_a_full_reset(
    name: str, net: str
) -> None:
    """The second copy has made one step less: it is not due yet and keeps everything."""
    spec, names = STALE[name]
    torch.manual_seed(0)
    model = nn.Sequential(BatchedLinear(2, 3, 6), nn.ReLU(), BatchedLinear(2, 6, 2))
    optimizer = BatchedAdam(model.parameters(), lr=0.01)
    units = find_units(model, torch.zeros(2, 1, 3), keys={"0": "body/0", "2": "head/0"})
    at = "reset:every=12" + ("" if net == "all" else ",net=body")
    handle = attach([spec, at], units, optimizer, hooks=False)
    fresh = {key: value.clone() for key, value in handle.interventions[name].state_dict().items()}

    def step(active: list[int] | None = None) -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 1, 3)).square().sum().backward()
        handle.before_step(active)
        optimizer.step(active)
        handle.after_step(active)

    step([0])
    for _ in range(10):
        step()
    gathered = {key: handle.interventions[name].get_buffer(key).clone() for key in names}
    assert any(not torch.equal(gathered[key][0], fresh[key][0]) for key in names)
    step()
    for key in names:
        now = handle.interventions[name].get_buffer(key)
        if net == "all":
            assert torch.equal(now[0], fresh[key][0]), key
    assert any(
        not torch.equal(handle.interventions[name].get_buffer(key)[1], fresh[key][1])
        for key in names
    )
    if net == "part":
        assert any(
            not torch.equal(handle.interventions[name].get_buffer(key)[0], fresh[key][0])
            for key in names
        )


def test_the_tortoise_starts_anew_with_the_hare_in_a_full_reset() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    units = find_units(model, torch.zeros(1, 3))
    methods = ["reset:every=5", "hare-tortoise:every=0,momentum=0.9"]
    handle = attach(methods, units, optimizer)
    slow = handle.interventions["hare-tortoise"]
    for step in range(1, 8):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        same = [
            torch.equal(slow.get_buffer(f"tortoise{place}")[0], p)
            for place, p in enumerate(model.parameters())
        ]
        assert all(same) if step == 5 else not any(same)
