"""What every plasticity method of the registry must hold, whatever it does."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial import plasticity
from perennial.plasticity import BatchedAdam, attach, draws, kernels, make, parse_spec
from perennial.plasticity.registry import METHODS
from tests.host_questions import no_host_questions
from tests.plasticity_cases import (
    ACTING,
    NEEDS_ADAM,
    NULL,
    RECYCLING,
    Run,
    acting,
    adam,
    batched,
    batched_images,
    batches,
    convolutional,
    images,
    method_of,
    plain,
    sgd,
    shallow,
)

every_method = pytest.mark.parametrize("spec", acting())
once_per_method = pytest.mark.parametrize("spec", [ACTING.get(m, [m])[0] for m in METHODS])

with_a_step = pytest.mark.parametrize(
    "spec",
    [ACTING.get(m, [m])[0] for m in METHODS if NULL.get(m) != m],  # the others change the network
)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def differs(a: Run, b: Run) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a.weights(), b.weights(), strict=True))


def test_every_method_of_the_registry_is_in_the_tables() -> None:
    assert set(ACTING) == set(METHODS), "give each method settings in plasticity_cases.ACTING"
    assert set(NULL) == set(METHODS), "give each method its null setting in plasticity_cases.NULL"
    for name, specs in ACTING.items():
        assert {method_of(spec) for spec in specs} == {name}
        kind = type(make(name))
        assert getattr(plasticity, kind.__name__) is kind and kind.__name__ in plasticity.__all__


@pytest.mark.parametrize("spec", [spec for spec in NULL.values() if spec])
@pytest.mark.parametrize("kind", ["batched", "plain", "sgd"])
def test_null_setting_is_the_plain_run_bit_for_bit(spec: str, kind: str) -> None:
    if kind == "sgd" and method_of(spec) in NEEDS_ADAM:
        pytest.skip("needs Adam")
    network = batched if kind == "batched" else plain
    optimizer: Callable[..., Optimizer] = {"batched": BatchedAdam, "plain": adam, "sgd": sgd}[kind]
    if method_of(spec) == "adam-equal-betas":
        kinds = {"batched": BatchedAdam, "plain": torch.optim.Adam}
        optimizer = lambda p, lr: kinds[kind](p, lr=lr, betas=(0.9, 0.9))  # noqa: E731
    seeds = (0, 1) if kind == "batched" else (0,)
    data = batches(seeds, 25, torch.float32)
    expected = Run([spec], seeds, torch.float32, optimizer, network, attached=False).train(data)
    before = _streams()
    null = Run([spec], seeds, torch.float32, optimizer, network).train(data)
    assert _streams() == before
    ours, theirs = null.tensors(), expected.tensors()
    same(
        {k: ours[k] for k in theirs if not k.startswith("handle.")},
        {k: v for k, v in theirs.items() if not k.startswith("handle.")},
    )


def _streams() -> tuple[Any, ...]:
    """States of the random streams that everybody shares."""
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@every_method
def test_methods_act_stay_finite_and_draw_from_no_other_stream(spec: str) -> None:
    data = batches((0, 1), 25, torch.float32)
    plainly = Run([], (0, 1), torch.float32).train(data)
    before = _streams()
    run = Run([spec], (0, 1), torch.float32)
    run.handle.on_change()  # before there is any optimizer state
    run.train(data, changes=(8, 16))
    assert _streams() == before
    for tensor in run.tensors().values():
        assert tensor.isfinite().all()
    same_shapes = [p.shape for p in run.net.parameters()] == [
        p.shape for p in plainly.net.parameters()
    ]
    assert not same_shapes or differs(run, plainly)


@every_method
def test_saved_and_loaded_state_continues_bit_for_bit(spec: str) -> None:
    seeds, changes = (3, 7), (6, 14, 24)
    data = batches(seeds, 40, torch.float32)
    whole = Run([spec], seeds, torch.float32).train(data, changes)
    first = Run([spec], seeds, torch.float32).train(data[:17], changes)
    file = io.BytesIO()
    torch.save((first.handle.state_dict(), [first.handle.state_of(c) for c in (0, 1)]), file)
    file.seek(0)
    by_dict, by_copy = torch.load(file, weights_only=True)
    again, apart = Run([spec], seeds, torch.float32), Run([spec], (0, 1), torch.float32)
    for run in (again, apart):
        run.net.load_state_dict(first.net.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.handle.load_state_dict(by_dict)
    for c in (0, 1):
        apart.optimizer.load_state_of(c, first.optimizer.state_of(c))  # type: ignore[attr-defined]
        apart.handle.load_state_of(c, by_copy[c])
    for run in (again, apart):
        run.train(data[17:], [c - 17 for c in changes])
        same(run.tensors(), whole.tensors())


@once_per_method
def test_state_of_convolutions_under_torchs_adam_continues_bit_for_bit(spec: str) -> None:
    def start() -> Run:
        try:
            return Run([spec], (3,), torch.float32, adam, convolutional)
        except ValueError as error:  # a method that does not fit says so in one line
            assert "\n" not in str(error)
            pytest.skip(str(error))

    data = batches((3,), 24, torch.float32)
    whole, first, again = start().train(data), start().train(data[:13]), start()
    again.net.load_state_dict(first.net.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.handle.load_state_dict(first.handle.state_dict())
    same(again.train(data[13:]).tensors(), whole.tensors())


@pytest.mark.parametrize("network", [batched, batched_images])
@every_method
def test_seeds_side_by_side_equal_seeds_alone_also_when_some_stand_still(
    spec: str, network: Callable[..., nn.Module]
) -> None:
    seeds, steps = (4, 0, 9), 36
    data = batches(seeds, steps)

    def moves(place: int, step: int) -> bool:
        return not (step % 4 == 1 and place == 1) and not (step in (6, 13, 20) and place != 1)

    together = Run([spec], seeds, network=network)
    for step, x in enumerate(data):
        active = [moves(place, step) for place in range(3)]
        if step in (9, 22):
            together.handle.on_change()
        together.gradients(x)
        before = together.tensors()
        together.move(None if all(active) else active)
        after = together.tensors()
        for place in range(3):
            if not active[place]:
                for key, value in before.items():
                    assert step == 0 or torch.equal(value[place], after[key][place]), key
    for place, seed in enumerate(seeds):
        alone = Run([spec], (seed,), network=network)
        for step, x in enumerate(batches((seed,), steps)):
            if step in (9, 22):
                alone.handle.on_change()
            if moves(place, step):
                alone.gradients(x)
                alone.move()
        for (key, a), b in zip(together.tensors().items(), alone.tensors().values(), strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(a[place], b[0], rtol=1e-8, atol=1e-9, msg=key)
            else:
                assert torch.equal(a[place], b[0]), key


@pytest.mark.parametrize(
    "networks", [(batched, plain), (batched_images, images)], ids=["linear", "images"]
)
@every_method
def test_plain_layers_with_torchs_adam_equal_one_batched_copy(
    spec: str, networks: tuple[Callable[..., nn.Module], Callable[..., nn.Module]]
) -> None:
    data = batches((5,), 25)
    ours = Run([spec], (5,), network=networks[0])
    theirs = Run([spec], (5,), optimizer=adam, network=networks[1], attached=False)
    for p, q in zip(theirs.net.parameters(), ours.net.parameters(), strict=True):
        assert p.shape == q.shape[1:]
        p.data.copy_(q.data[0])
    for m, n in zip(theirs.net.modules(), ours.net.modules(), strict=True):
        if hasattr(n, "init"):
            m.init = n.init
    theirs.attach([spec])
    ours.train(data, changes=(9,))
    theirs.train(data, changes=(9,))
    for p, q in zip(theirs.weights(), ours.weights(), strict=True):
        torch.testing.assert_close(p, q[0], rtol=0, atol=1e-8)
    for name, count in ours.handle.counts().items():
        assert torch.equal(count, theirs.handle.counts()[name])


@with_a_step
def test_compiled_hooks_equal_eager_ones(spec: str) -> None:
    _compiled_equals_eager(spec, "aot_eager", shallow, whole=False)


def test_a_whole_compiled_step_equals_an_eager_one() -> None:
    _compiled_equals_eager("cbp:rate=0.1,maturity=4", "aot_eager", shallow, whole=True)


def test_hooks_compiled_beside_torchs_own_adam_equal_eager_ones() -> None:
    """Its step refuses to be part of a whole graph."""
    spec = "cbp:rate=0.1,maturity=4"
    _compiled_equals_eager(spec, "aot_eager", shallow, whole=False, kind=adam)


@pytest.mark.parametrize(
    "spec", ["cbp:rate=0.1,maturity=4", "redo:threshold=0.7,every=5,batches=3"]
)
def test_a_compiled_forward_feeds_the_methods(spec: str) -> None:
    """Attached before compiling, activations are recorded as in an eager forward."""
    torch._dynamo.reset()
    eager, compiled = Run([spec], (0, 1)), Run([spec], (0, 1))
    compiled.call = torch.compile(compiled.net, fullgraph=True, backend="aot_eager")
    data = batches((0, 1), 20)
    eager.train(data)
    compiled.train(data)
    for a, b in zip(eager.weights(), compiled.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for name, count in eager.handle.counts().items():
        assert count.min() > 0 and torch.equal(count, compiled.handle.counts()[name])


@pytest.mark.slow
@every_method
def test_every_way_of_a_compiled_step_equals_an_eager_one(spec: str) -> None:
    _compiled_equals_eager(spec, "aot_eager", batched, whole=True)


@pytest.mark.slow
def test_random_numbers_compiled_by_inductor_have_the_same_bits() -> None:
    torch._dynamo.reset()

    def numbers(keys: Tensor) -> tuple[Tensor, Tensor]:
        stream = draws.Stream(keys).fold(5)
        return stream.uniform(9), draws.fold(keys.unsqueeze(-1), torch.arange(1, 5))

    keys = torch.tensor([draws.key_of(seed, "test") for seed in range(3)])
    compiled = torch.compile(numbers, fullgraph=True)(keys)
    for ours, theirs in zip(numbers(keys), compiled, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@with_a_step
def test_hooks_compiled_by_inductor_equal_eager_ones(spec: str) -> None:
    _compiled_equals_eager(spec, "inductor", shallow, whole=False)


def _compiled_equals_eager(
    spec: str,
    backend: str,
    network: Callable[..., nn.Module],
    whole: bool,
    kind: Callable[..., Optimizer] = BatchedAdam,
) -> None:
    """Compiled without a graph break: hooks and optimizer together, or the hooks alone."""
    torch._dynamo.reset()
    data = batches((0, 1), 20)
    # Adam where its state matters; elsewhere its per-unit steps would only take time to compile.
    adams = whole or method_of(spec) in (*RECYCLING, *NEEDS_ADAM, "optimizer-reset")
    eager, compiled = (
        Run([spec], (0, 1), optimizer=kind if adams else sgd, network=network) for _ in range(2)
    )
    if isinstance(compiled.optimizer, BatchedAdam):
        compiled.optimizer.prepare()
    before, move, after = (
        torch.compile(function, fullgraph=True, backend=backend)
        for function in (compiled.handle.before_step, compiled.move, compiled.handle.after_step)
    )
    for place, x in enumerate(data):
        eager.gradients(x)
        eager.move()
        compiled.gradients(x)
        if place >= 15:  # back to eager: what the host knows is read again
            compiled.move()
        elif whole:
            move()
        else:
            before()
            compiled.optimizer.step()
            after()
    theirs = compiled.tensors()
    for key, value in eager.tensors().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, theirs[key], rtol=1e-8, atol=1e-9, msg=key)
        else:
            assert torch.equal(value, theirs[key]), key


@every_method
def test_steps_ask_no_tensor_for_its_value_and_leave_the_optimizers_keys(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, without the loops over memory of the CPU."""
    monkeypatch.setattr(kernels, "ready", lambda *_: False)
    run = Run([spec], (0, 1), torch.float32)
    usual = Run([], (0, 1), torch.float32).train(batches((0, 1), 1, torch.float32))
    keys = set(usual.optimizer.state[next(usual.net.parameters())])
    for place, x in enumerate(batches((0, 1), 70, torch.float32)):
        run.gradients(x)
        active = [True, False] if place % 7 == 3 else None
        with no_host_questions():
            run.handle.before_step(active)
        run.optimizer.step(active)  # type: ignore[arg-type]
        with no_host_questions():
            run.handle.after_step(active)
    assert all(set(state) == keys for state in run.optimizer.state.values())


@every_method
def test_state_is_buffers_with_the_copies_axis_apart_from_the_model(spec: str) -> None:
    seeds = (0, 1, 2)
    bare = Run([spec], seeds, attached=False)
    run = Run([spec], seeds).train(batches(seeds, 6))
    assert run.net.state_dict().keys() == bare.net.state_dict().keys()
    assert [p.shape for p in run.net.parameters()] == [p.shape for p in bare.net.parameters()]
    trained = {p for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == set(run.net.parameters())
    for intervention in run.handle.interventions.values():
        assert list(intervention.parameters()) == []
    for key, value in run.handle.state_dict().items():
        assert value.shape[0] == 3 and not value.requires_grad, key


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
}


@once_per_method
@pytest.mark.parametrize(
    "kind, network",
    [*((kind, plain) for kind in OPTIMIZERS), ("adam", convolutional), ("rmsprop", convolutional)],
)
def test_methods_work_by_hooks_of_every_optimizer(
    spec: str, kind: str, network: Callable[..., nn.Module]
) -> None:
    """Attached as users do, until they detach; then it is the plain run again."""
    if method_of(spec) in NEEDS_ADAM and kind in ("rmsprop", "sgd", "sgd-momentum"):
        with pytest.raises(ValueError, match="needs an optimizer with betas"):
            Run([spec], optimizer=lambda p, lr: OPTIMIZERS[kind](p), network=network)
        return
    try:
        run = Run(
            [spec], optimizer=lambda p, lr: OPTIMIZERS[kind](p), network=network, attached=False
        )
    except ValueError as error:
        assert "\n" not in str(error)
        pytest.skip(str(error))
    bare = Run([spec], optimizer=lambda p, lr: OPTIMIZERS[kind](p), network=network, attached=False)
    handle = attach(spec, run.handle.units, run.optimizer)
    data = batches((0,), 12)
    for x in data:
        run.gradients(x)
        run.optimizer.step()
        bare.gradients(x)
        bare.optimizer.step()
    assert handle.clock.updates.tolist() == [12]
    assert all(p.isfinite().all() for p in run.net.parameters())
    idle = NULL.get(method_of(spec)) == method_of(spec)  # then the changed network is the method
    stateless = method_of(spec) == "optimizer-reset" and kind == "sgd"
    assert differs(run, bare) or idle or stateless
    handle.detach()
    if method_of(spec) in ("adam-equal-betas", "injection"):
        return  # the optimizer keeps its settings, the network its frozen heads
    bare.net.load_state_dict(run.net.state_dict())
    bare.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for x in data:
        for either in (run, bare):
            either.gradients(x)
            either.optimizer.step()
    assert not differs(run, bare)


def test_many_methods_on_one_optimizer_act_in_stages_and_continue_bit_for_bit() -> None:
    together = [
        specs[0] for name, specs in reversed(ACTING.items()) if not make(specs[0]).rewrites
    ] + ["layer-norm"]
    seeds = (1, 2)
    data = batches(seeds, 30, torch.float32)
    whole = Run(together, seeds, torch.float32).train(data, changes=(11, 20))
    stages = [method.stage for method in whole.handle.interventions.values()]
    assert stages == sorted(stages) and len(stages) == len(together)
    first = Run(together, seeds, torch.float32).train(data[:15], changes=(11,))
    again = Run(together, seeds, torch.float32)
    again.net.load_state_dict(first.net.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.handle.load_state_dict(first.handle.state_dict())
    again.train(data[15:], changes=(5,))
    same(again.tensors(), whole.tensors())
    assert all(value.isfinite().all() for value in whole.tensors().values())


def _wrong_specs() -> list[str]:
    """Every number of every method just out of its range, and words that are no choice."""
    found = []
    for name, entry in METHODS.items():
        for key, param in entry.params.items():
            if param.choices or isinstance(param.default, bool):
                found.append(f"{name}:{key}=nonsense")
                continue
            if isinstance(param.default, str):
                continue
            found.append(f"{name}:{key}=nan")
            if param.low is not None:
                found.append(f"{name}:{key}={param.low if param.open_low else param.low - 1}")
            if param.high is not None:
                found.append(f"{name}:{key}={param.high + 1}")
    return found


@pytest.mark.parametrize("spec", _wrong_specs())
def test_values_out_of_range_are_refused_in_one_line(spec: str) -> None:
    name, _, assignment = spec.partition(":")
    key, _, value = assignment.partition("=")
    with pytest.raises(ValueError) as error:
        parse_spec(spec)
    assert name in str(error.value) and key in str(error.value) and "\n" not in str(error.value)
    kind = type(make(name))
    with pytest.raises(ValueError):
        kind(**{key: value if value == "nonsense" else float(value)})


@pytest.mark.parametrize("name", METHODS)
def test_misspelt_names_are_answered_with_the_right_one(name: str) -> None:
    wrong = name[:-1] + ("x" if name[-1] != "x" else "y")
    with pytest.raises(ValueError) as error:
        parse_spec(wrong)
    assert f"{name!r}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_bare_name_works_and_tells_its_source(name: str) -> None:
    run = Run([name], (0, 1), torch.float32).train(batches((0, 1), 3, torch.float32))
    assert all(p.isfinite().all() for p in run.net.parameters())
    text = type(make(name)).__doc__
    assert text is not None and any(word in text for word in ("arXiv", "Nature", "EWRL", "20"))
