"""Compiled loops of the CPU against the same in tensor operations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from perennial.plasticity import BatchedAdam, kernels
from tests.plasticity_cases import Run, batched, batched_images, batches, plain

CBP = "cbp:rate=0.05,maturity=4"
REDO = "redo:threshold=0.7,every=5,batches=3"


def _without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ready", lambda *_: False)


@pytest.mark.parametrize("optimizer", [BatchedAdam, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("specs", "network"),
    [
        ([CBP], batched),
        ([REDO], batched),
        ([CBP], plain),
        ([CBP], batched_images),  # a channel owns a block of columns
        ([CBP, "crelu"], batched),  # a unit owns two columns
        (["snr:percentile=0.6,initial=1,every=5,check=2"], batched),
        (["l2-init:strength=0.3"], batched),
        (["l2-init:strength=0.3", CBP], batched_images),
    ],
    ids=["cbp", "redo", "plain", "images", "crelu", "snr", "l2-init", "l2-init, images"],
)
def test_loops_train_as_tensor_operations_do(
    specs: list[str],
    network: Callable[..., nn.Module],
    optimizer: Callable[..., torch.optim.Optimizer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if network is plain and optimizer is BatchedAdam:
        pytest.skip("BatchedAdam is for networks with a copies axis")
    seeds = (0,) if network is plain else (0, 1)
    data = batches(seeds, 60)
    loops = Run(specs, seeds, optimizer=optimizer, network=network).train(data)
    assert kernels.ready(*loops.net.parameters())
    assert all(count.gt(0).all() for count in loops.handle.counts().values())
    _without_loops(monkeypatch)
    usual = Run(specs, seeds, optimizer=optimizer, network=network).train(data)
    theirs = usual.tensors()
    for key, value in loops.tensors().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-8, atol=1e-9, msg=key)


@pytest.mark.parametrize("spec", ["l2-init:strength=0.3", "parseval:strength=0.3,every=2"])
def test_a_network_that_moved_is_pulled_where_it_is(spec: str) -> None:
    data = batches((0,), 5)
    usual = Run([spec], (0,), network=batched).train(data)
    run = Run([spec], (0,), network=batched)
    run.train(data[:1])
    for p in run.net.parameters():
        p.data = p.detach().clone()
        p.grad = None
    run.train(data[1:])
    for ours, theirs in zip(run.net.parameters(), usual.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_copies_that_stand_still_are_left_out_of_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for loops in (True, False):
        if not loops:
            _without_loops(monkeypatch)
        run = Run([CBP], (4, 9))
        for step, x in enumerate(batches((4, 9), 60)):
            run.gradients(x)
            run.move(None if step % 3 else [True, False])
        found.append(run.tensors())
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-8, atol=1e-9, msg=key)


def test_a_handle_that_is_detached_leaves_a_plain_adam() -> None:
    run = Run([CBP], (0,)).train(batches((0,), 20))
    assert isinstance(run.optimizer, BatchedAdam) and run.optimizer.aging is not None
    run.handle.detach()
    assert run.optimizer.aging is None


def test_what_the_loops_do_not_take() -> None:
    weight = torch.zeros(2, 3)
    assert kernels.ready(weight, weight.double())
    assert not kernels.ready(weight, weight.half())
    assert not kernels.ready(weight.t())
    assert not kernels.ready(weight.to("meta"))


@pytest.mark.parametrize(
    "first",
    ["import sys; sys.modules['numba'] = None", "import os; os.environ['NUMBA_DISABLE_JIT'] = '1'"],
    ids=["no wheel", "switched off"],
)
def test_everything_works_without_numba(first: str) -> None:
    """The same in tensor operations."""
    program = """
from perennial.plasticity import kernels
from tests.plasticity_cases import Run, batches
import torch
assert not kernels.ready(torch.zeros(1))
data = batches((0, 1), 20, torch.float32)
run = Run(["cbp:rate=0.05,maturity=4"], (0, 1), torch.float32).train(data)
assert all(p.isfinite().all() for p in run.net.parameters())
assert run.handle.counts()["cbp"].gt(0).all()
"""
    done = subprocess.run([sys.executable, "-c", first + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
