"""What every method must hold: null setting, state, copies, compilation, no device questions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity import (
    BatchedAdam,
    BatchedLinear,
    Handle,
    Init,
    Intervention,
    Stage,
    attach,
    draws,
    find_units,
    make,
    parse_spec,
    registry,
)

# Specs at which every method acts within a few steps, and at which it does nothing.
ACTING = [
    "cbp:rate=0.05,maturity=4",
    "cbp:rate=0.05,maturity=4,utility=mean-corrected,count=accumulate",
    "cbp:rate=0.05,maturity=4,utility=random,moments=zero",
    "cbp:rate=0.3,maturity=2,reference=nature,utility=adaptable",
    "l2:strength=0.01",
    "l2:strength=0.01,scope=weights",
    "adam-equal-betas",
]
NULL = ["cbp:rate=0", "l2:strength=0"]


def network(copies: int, seeds: Sequence[int], dtype: torch.dtype = torch.float64) -> nn.Module:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def layer(n_in: int, n_out: int) -> BatchedLinear:
        init = Init("lecun-uniform")
        return BatchedLinear(copies, n_in, n_out, init=init, generators=generators, dtype=dtype)

    return nn.Sequential(layer(3, 8), nn.ReLU(), layer(8, 6), nn.Tanh(), layer(6, 2))


def batches(seeds: Sequence[int], steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Every seed's own data, `[S, 16, 3]` per step."""
    streams = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    return [
        torch.stack([torch.randn(16, 3, generator=g, dtype=dtype) for g in streams])
        for _ in range(steps)
    ]


class Run:
    """A network in training with methods attached."""

    def __init__(
        self,
        specs: Sequence[str],
        seeds: Sequence[int] = (0,),
        dtype: torch.dtype = torch.float64,
        optimizer: Callable[..., Optimizer] = BatchedAdam,
        hooks: bool = True,
    ) -> None:
        self.net = network(len(seeds), seeds, dtype)
        self.optimizer = optimizer(self.net.parameters(), lr=0.01)
        units = find_units(self.net, torch.zeros(len(seeds), 1, 3, dtype=dtype))
        self.handle: Handle = attach(list(specs), units, self.optimizer, seeds=seeds, hooks=hooks)

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = (self.net(x).sin() - x[..., :2]).square().mean((1, 2)).sum()
        loss.backward()
        self.optimizer.step()

    def train(self, data: Sequence[Tensor]) -> Run:
        for x in data:
            self.step(x)
        return self

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]


@pytest.mark.parametrize("spec", NULL)
@pytest.mark.parametrize("optimizer", [BatchedAdam, torch.optim.Adam, torch.optim.SGD])
def test_null_setting_is_the_plain_run_bit_for_bit(
    spec: str, optimizer: Callable[..., Optimizer]
) -> None:
    data = batches((0, 1), 30, torch.float32)
    plain = Run([], (0, 1), torch.float32, optimizer).train(data)
    null = Run([spec], (0, 1), torch.float32, optimizer).train(data)
    for a, b in zip(plain.weights(), null.weights(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", ACTING)
def test_methods_act_and_take_nothing_from_other_random_streams(spec: str) -> None:
    data = batches((0,), 30)
    plain = Run([]).train(data)
    before = torch.get_rng_state()
    acting = Run([spec]).train(data)
    assert torch.equal(before, torch.get_rng_state())
    assert any(
        not torch.equal(a, b) for a, b in zip(plain.weights(), acting.weights(), strict=True)
    )
    assert all(w.isfinite().all() for w in acting.weights())


@pytest.mark.parametrize("spec", ACTING)
def test_saved_and_loaded_state_continues_bit_for_bit(spec: str) -> None:
    data = batches((3, 7), 60, torch.float32)
    whole = Run([spec], (3, 7), torch.float32).train(data)
    first = Run([spec], (3, 7), torch.float32).train(data[:25])
    by_dict, by_copy = (Run([spec], seeds, torch.float32) for seeds in ((3, 7), (0, 1)))
    for other in (by_dict, by_copy):
        other.net.load_state_dict(first.net.state_dict())
    by_dict.optimizer.load_state_dict(first.optimizer.state_dict())
    by_dict.handle.load_state_dict(first.handle.state_dict())
    for copy in (0, 1):
        by_copy.optimizer.load_state_of(copy, first.optimizer.state_of(copy))
        by_copy.handle.load_state_of(copy, first.handle.state_of(copy))
    for other in (by_dict, by_copy):
        other.train(data[25:])
        for a, b in zip(whole.weights(), other.weights(), strict=True):
            assert torch.equal(a, b)
        assert other.handle.state_dict().keys() == whole.handle.state_dict().keys()
        for key, value in whole.handle.state_dict().items():
            assert torch.equal(value, other.handle.state_dict()[key]), key


@pytest.mark.parametrize("spec", ACTING)
def test_seeds_side_by_side_equal_seeds_alone(spec: str) -> None:
    seeds = (4, 0, 9)
    together = Run([spec], seeds).train(batches(seeds, 40))
    for place, seed in enumerate(seeds):
        alone = Run([spec], (seed,)).train(batches((seed,), 40))
        for a, b in zip(together.weights(), alone.weights(), strict=True):
            torch.testing.assert_close(a[place], b[0], rtol=0, atol=1e-9)
        mine, theirs = together.handle.state_of(place), alone.handle.state_of(0)
        for key in mine:
            if not mine[key].is_floating_point():
                assert torch.equal(mine[key], theirs[key]), key
    counts = together.handle.counts()
    if "cbp" in counts:
        assert counts["cbp"].min() > 0


def test_plain_modules_with_torchs_adam_equal_one_batched_copy() -> None:
    spec, data = "cbp:rate=0.05,maturity=4", batches((0,), 40)
    batched = Run([spec]).train(data)
    net = nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)
    ).double()
    for theirs, ours in zip(net.parameters(), network(1, (0,)).parameters(), strict=True):
        theirs.data.copy_(ours.data[0])
    for place in (0, 2, 4):
        net[place].init = Init("lecun-uniform")  # type: ignore[assignment]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    handle = attach(spec, find_units(net, data[0][0]), optimizer, seeds=(0,))
    for x in data:
        optimizer.zero_grad()
        (net(x[0]).sin() - x[0, :, :2]).square().mean().backward()
        optimizer.step()
    assert torch.equal(handle.counts()["cbp"], batched.handle.counts()["cbp"])
    assert handle.counts()["cbp"] > 0
    for theirs, ours in zip(net.parameters(), batched.net.parameters(), strict=True):
        torch.testing.assert_close(theirs.data, ours.data[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("spec", ACTING)
@pytest.mark.parametrize("optimizer", [BatchedAdam, torch.optim.Adam])
def test_a_compiled_step_equals_the_eager_one(
    spec: str, optimizer: Callable[..., Optimizer]
) -> None:
    torch._dynamo.reset()
    data = batches((0, 1), 24)
    eager = Run([spec], (0, 1), optimizer=optimizer)
    compiled = Run([spec], (0, 1), optimizer=optimizer, hooks=False)
    compile_ = torch.compile(fullgraph=True, backend="aot_eager")
    if isinstance(compiled.optimizer, BatchedAdam):
        compiled.optimizer.prepare()

        @compile_
        def step() -> None:
            compiled.handle.before_step()
            compiled.optimizer.step()
            compiled.handle.after_step()

    else:  # torch's own step refuses to be part of a whole graph
        before, after = compile_(compiled.handle.before_step), compile_(compiled.handle.after_step)

        def step() -> None:
            before()
            compiled.optimizer.step()
            after()

    def forward(run: Run, x: Tensor) -> None:
        run.optimizer.zero_grad(set_to_none=False)
        (run.net(x).sin() - x[..., :2]).square().mean((1, 2)).sum().backward()

    for place, x in enumerate(data):
        forward(eager, x)
        eager.optimizer.step()
        forward(compiled, x)
        if place < 16:
            step()
        else:  # back to eager: what the host knows is read again
            compiled.handle.before_step()
            compiled.optimizer.step()
            compiled.handle.after_step()
    for a, b in zip(eager.weights(), compiled.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    ours, theirs = eager.handle.state_dict(), compiled.handle.state_dict()
    for key, value in ours.items():
        if not value.is_floating_point():
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("spec", ACTING)
def test_steps_never_ask_a_tensor_for_its_value(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run([spec], (0, 1), hooks=False)
    data = batches((0, 1), 80)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a step asked a tensor for its value")

    for x in data:
        run.optimizer.zero_grad()
        (run.net(x) - 1.0).square().mean((1, 2)).sum().backward()
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
                patch.setattr(torch.Tensor, name, refuse)
            run.handle.before_step()
            run.handle.after_step()
        run.optimizer.step()


@pytest.mark.parametrize("spec", ACTING)
def test_state_is_in_buffers_with_the_copies_axis_and_not_in_parameters(spec: str) -> None:
    run = Run([spec], (0, 1, 2)).train(batches((0, 1, 2), 3))
    for intervention in run.handle.interventions.values():
        assert list(intervention.parameters()) == []
    assert all(value.shape[0] == 3 for value in run.handle.state_dict().values())
    assert all(value.device.type == "cpu" for value in run.handle.state_of(1).values())


def test_misspelt_hooks_are_refused_when_the_class_is_made() -> None:
    with pytest.raises(ValueError, match=r"Wrong\.after_setp is no hook; did you mean 'after_s"):
        type("Wrong", (Intervention,), {"after_setp": lambda self: None})
    with pytest.raises(ValueError, match=r"on_task is no hook; .*before_step, after_step"):
        type("Wrong", (Intervention,), {"on_task": lambda self: None})

    class Right(Intervention):
        def after_step(self) -> None: ...
        def _helper(self) -> None: ...
        def describe(self) -> str:
            return "fine"


def test_methods_act_in_the_order_of_their_stage() -> None:
    seen: list[str] = []

    def method(title: str, at: Stage) -> Intervention:
        class Noted(Intervention):
            name, stage = title, at

            def after_step(self) -> None:
                seen.append(title)

            def on_change(self) -> None:
                seen.append(f"{title} told")

        return Noted()

    net = network(1, (0,))
    units = find_units(net, torch.zeros(1, 1, 3, dtype=torch.float64))
    optimizer = BatchedAdam(net.parameters())
    methods = [
        method("reset", Stage.RESET), method("noise", Stage.NOISE),
        method("recycle", Stage.RECYCLE), method("noise", Stage.NOISE),
        method("decay", Stage.DECAY),
    ]  # fmt: skip
    handle = attach(methods, units, optimizer)
    assert list(handle.interventions) == ["decay", "noise", "noise-2", "recycle", "reset"]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert seen == ["decay", "noise", "noise", "recycle", "reset"]
    handle.on_change()
    assert seen[5] == "decay told"
    handle.detach()
    optimizer.step()
    assert len(seen) == 10


def test_attach_refuses_what_cannot_work() -> None:
    run = Run(["cbp"], (0, 1))
    units, method = run.handle.units, run.handle.interventions["cbp"]
    with pytest.raises(ValueError, match="attached already"):
        attach(method, units, run.optimizer)
    with pytest.raises(ValueError, match="3 seeds for 2 copies"):
        attach("cbp", units, run.optimizer, seeds=(1, 2, 3))
    with pytest.raises(ValueError, match="neither an Intervention nor a spec"):
        attach([nn.ReLU()], units, run.optimizer)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"it lacks .*cbp\.age"):
        run.handle.load_state_dict({})
    wrong = run.handle.state_dict() | {"cbp.age": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"cbp\.age has shape \[2, 3\]"):
        run.handle.load_state_dict(wrong)
    with pytest.raises(ValueError, match="needs an optimizer with betas"):
        attach("adam-equal-betas", units, torch.optim.SGD(run.net.parameters(), 0.1))


def test_equal_betas_are_set_before_the_first_step() -> None:
    run = Run(["adam-equal-betas:beta=0.9", "cbp"])
    assert run.optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    assert list(run.handle.moments.paces) == [(0.9, 0.9)]


def test_l2_equals_weight_decay_of_adam_and_leaves_biases_if_told() -> None:
    data = batches((0,), 10)
    ours = Run(["l2:strength=0.1"]).train(data)
    theirs = Run([], optimizer=lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=0.1))
    theirs.train(data)
    for a, b in zip(ours.weights(), theirs.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    run = Run(["l2:strength=0.1,scope=weights"], hooks=False)
    for p in run.net.parameters():
        p.grad = torch.zeros_like(p)
        p.data.fill_(2.0)
    run.handle.before_step()
    for p in run.net.parameters():
        assert p.grad.unique().tolist() == ([0.2] if p.ndim == 3 else [0.0])
    run.optimizer.step()  # coupled: Adam's first step is the learning rate, whatever the strength
    assert all((p - 1.99).abs().max() < 1e-6 for p in run.net.parameters() if p.ndim == 3)


def test_specs_are_read_and_wrong_ones_explained_in_one_line() -> None:
    assert parse_spec(" cbp : rate=1e-3, maturity=10_000 ") == (
        "cbp",
        {"rate": 1e-3, "maturity": 10_000},
    )
    assert parse_spec("l2") == ("l2", {})
    assert parse_spec("cbp:maturity=1e4")[1] == {"maturity": 10_000}
    for spec, message in (
        ("cbb", "unknown plasticity method 'cbb'; did you mean 'cbp'?"),
        ("cbp:rat=1", "unknown parameter 'rat'; did you mean 'rate'?"),
        ("cbp:rate=nan", "rate=nan is not a number"),
        ("cbp:rate=2", "rate=2 must be >= 0 and <= 1"),
        ("cbp:maturity=1.5", "maturity=1.5 is not a whole number"),
        ("cbp:rate", "write cbp:parameter=value"),
        ("cbp:", "write cbp:parameter=value"),
        ("cbp:rate=1,rate=2", "given twice"),
        ("cbp:utility=weigth", "did you mean 'weight'"),
        ("l2:strength=-1", "strength=-1 must be >= 0"),
    ):
        with pytest.raises(ValueError) as error:
            parse_spec(spec)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_registry_and_classes_agree() -> None:
    import inspect

    for name, entry in registry.METHODS.items():
        method = make(name)
        assert method.name == name and type(method).__name__ == entry.cls
        signature = inspect.signature(type(method).__init__).parameters
        defaults = {k: p.default for k, p in signature.items() if k != "self"}
        assert defaults == {k: p.default for k, p in entry.params.items()}
        assert all(p.help and p.range for p in entry.params.values()) and entry.paper
        assert parse_spec(name + ":" + ",".join(f"{k}={v}" for k, v in defaults.items()))[1] == (
            defaults
        )
        assert len(entry.line) < 100 and type(method).__doc__


def test_checking_a_spec_needs_no_torch() -> None:
    code = (
        "import sys; from perennial.plasticity import parse_spec, registry; parse_spec('cbp');"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_random_numbers_on_host_and_device_have_the_same_bits() -> None:
    keys = [draws.key_of(seed, "test") for seed in (0, 1, 2**70)]
    assert len(set(keys)) == 3 and draws.key_of(0, "other") not in keys
    host, device = draws.Stream.known(keys), draws.Stream(torch.tensor(keys))
    for word in (0, 1, 5, 10**12):
        host, device = host.fold(word), device.fold(word)
        assert torch.equal(host.keys, device.keys)
    counters = [3, 10**9, 0]
    folded = draws.fold(device.keys, torch.tensor(counters))
    assert torch.equal(host.at(counters).keys, folded)
    exact = [draws.to_uniform_int(draws.fold_int(k, 7)) for k in host.keys.tolist()]
    assert host.fold(7).coin().tolist() == exact


def test_random_numbers_are_uniform_and_normal() -> None:
    stream = draws.Stream.known([draws.key_of(0, "a"), draws.key_of(1, "a")])
    u = stream.uniform(40_000)
    assert u.min() >= 0 and u.max() < 1
    assert (u.mean(-1) - 0.5).abs().max() < 3 * (1 / 12 / 40_000) ** 0.5
    counts = torch.histc(u[0], 20, 0, 1)
    assert ((counts - 2000).square() / 2000).sum() < 43.8  # chi-squared, 19 dof, 0.1 %
    assert torch.corrcoef(u)[0, 1].abs() < 0.02
    assert torch.corrcoef(torch.stack((u[0, :-1], u[0, 1:])))[0, 1].abs() < 0.02
    z = stream.normal(40_000)
    assert z.mean(-1).abs().max() < 0.015 and (z.std(-1) - 1).abs().max() < 0.015
    assert (z.pow(4).mean(-1) - 3).abs().max() < 0.2
