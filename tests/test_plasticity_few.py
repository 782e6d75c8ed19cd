"""Young units corrected as lists of elements: the same as whole tensors, resumed, side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from perennial.plasticity import BatchedAdam, few
from tests.host_questions import no_host_questions
from tests.plasticity_cases import Run, batched, batched_images, batches

CBP = "cbp:rate=0.05,maturity=4"
REDO = "redo:threshold=0.7,every=5,batches=3"
NETWORKS = pytest.mark.parametrize(
    ("specs", "network"),
    [
        ([CBP], batched),
        ([REDO], batched),
        ([CBP], batched_images),  # a channel owns a block of columns
        ([CBP, "crelu"], batched),  # a unit owns two columns
    ],
    ids=["cbp", "redo", "images", "crelu"],
)


def quick(parameters: object, lr: float) -> Optimizer:
    """Adam under which a unit is grown up after some forty steps."""
    return BatchedAdam(parameters, lr=lr, betas=(0.5, 0.5))  # type: ignore[arg-type]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of units counts as few."""
    monkeypatch.setattr(few, "_SHARE", 2.0)


def lists(run: Run) -> bool:
    """Whether the latest step corrected a list of elements."""
    return run.handle.moments._sparse


@NETWORKS
def test_lists_do_what_whole_tensors_do(
    specs: list[str], network: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, found = batches((0, 1), 90), []
    for share in (0.0, 2.0):
        monkeypatch.setattr(few, "_SHARE", share)
        run = Run(specs, (0, 1), optimizer=quick, network=network).train(data)
        assert lists(run) == (share > 0)
        found.append(run.tensors())
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=0, atol=1e-10, msg=key)


@NETWORKS
def test_a_resumed_run_corrects_the_same_elements_bit_for_bit(
    specs: list[str], network: Callable[..., nn.Module], always: None
) -> None:
    def start(seeds: tuple[int, int]) -> Run:
        return Run(specs, seeds, torch.float32, quick, network)

    data = batches((3, 7), 90, torch.float32)
    whole, first = start((3, 7)).train(data), start((3, 7)).train(data[:73])
    assert lists(whole) and lists(first)
    by_dict, by_copy = start((3, 7)), start((0, 1))
    for run in (by_dict, by_copy):
        run.train(batches((1, 2), 5, torch.float32))  # it was at work on something else
        run.net.load_state_dict(first.net.state_dict())
    by_dict.optimizer.load_state_dict(first.optimizer.state_dict())
    by_dict.handle.load_state_dict(first.handle.state_dict())
    for copy in (0, 1):
        by_copy.optimizer.load_state_of(copy, first.optimizer.state_of(copy))  # type: ignore[attr-defined]
        by_copy.handle.load_state_of(copy, first.handle.state_of(copy))
    for run in (by_dict, by_copy):
        run.train(data[73:])
        for key, value in whole.tensors().items():
            assert torch.equal(value, run.tensors()[key]), key


def test_copies_side_by_side_are_corrected_as_alone_also_when_one_stands_still(
    always: None,
) -> None:
    seeds, steps = (4, 9), 90
    together = Run([CBP], seeds, optimizer=quick)
    for step, x in enumerate(batches(seeds, steps)):
        together.gradients(x)
        together.move(None if step % 3 else [True, False])
    assert lists(together)
    for place, seed in enumerate(seeds):
        alone = Run([CBP], (seed,), optimizer=quick)
        for step, x in enumerate(batches((seed,), steps)):
            if step % 3 or place == 0:
                alone.gradients(x)
                alone.move()
        for (key, a), b in zip(together.tensors().items(), alone.tensors().values(), strict=True):
            torch.testing.assert_close(a[place], b[0], rtol=1e-8, atol=1e-9, msg=key)


@NETWORKS
def test_lists_ask_no_tensor_for_its_value(
    specs: list[str], network: Callable[..., nn.Module], always: None
) -> None:
    """On the CPU births are read where they lie; anything else would stop a GPU's work."""
    run = Run(specs, (0, 1), torch.float32, quick, network)
    for x in batches((0, 1), 70, torch.float32):
        run.gradients(x)
        with no_host_questions():
            run.handle.before_step()
        run.optimizer.step()
        with no_host_questions():
            run.handle.after_step()
    assert lists(run)


def test_many_young_units_are_corrected_as_whole_tensors() -> None:
    run = Run(["cbp:rate=0.3,maturity=2"], (0,), optimizer=quick).train(batches((0,), 90))
    assert not lists(run)


def test_a_null_event_leaves_nobody_to_correct() -> None:
    """Nothing is held back for units that were looked at and kept."""
    run = Run(["redo:threshold=0,every=5"], (0,), torch.float32, quick, batched)
    for p in run.net.parameters():
        p.data.abs_()  # nobody is dormant
    run.train([x.abs() for x in batches((0,), 6, torch.float32)])
    assert run.handle.counts()["redo"].item() == 0
    run.gradients(batches((0,), 1, torch.float32)[0])
    run.handle.before_step()
    assert not lists(run) and run.handle.moments._held == []
