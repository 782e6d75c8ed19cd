"""The protocol itself: hooks, stages, specs, the registry, random numbers. What every method must
hold is in test_plasticity_suite.py."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

from perennial.plasticity import (
    BatchedAdam,
    Intervention,
    Stage,
    attach,
    draws,
    find_units,
    make,
    parse_spec,
    registry,
)
from tests.plasticity_cases import Run, batched, batches


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

    net = batched((0,), torch.float64)
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
    run = Run(["l2:strength=0.1,scope=weights"])
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
