"""Checkpoints are whole or not there; damage is found and the one before is taken."""

import json
import os
import random

import numpy as np
import pytest
import torch

from perennial.agents import checkpoint
from perennial.agents.checkpoint import (
    checkpoints,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)

TREE = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "step": torch.tensor([3], dtype=torch.int64)},
    "array": np.linspace(0, 1, 5),
    "large": np.arange(1_200_000, dtype=np.float32).reshape(2, -1)[:, :550_000],
    "scalar": np.float64(0.1) + 0.2,
    "rng": {"state": 2**127 + 5, "name": "PCG64"},
    "lists": [1, 2.5, None, True, "x", [np.zeros(0)]],
}


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


def test_round_trip_and_rotation(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, TREE)
    assert checkpoints(tmp_path) == [20, 30]
    assert same(TREE, read_checkpoint(tmp_path, 30))
    step, (tree,) = newest_checkpoint([tmp_path])
    assert step == 30 and same(TREE, tree)


def test_seeds_resume_from_what_they_all_have(tmp_path):
    for step in (10, 20):
        write_checkpoint(tmp_path / "a", step, {"s": step})
    write_checkpoint(tmp_path / "b", 10, {"s": 11})
    assert newest_checkpoint([tmp_path / "a", tmp_path / "b"]) == (10, [{"s": 10}, {"s": 11}])
    assert newest_checkpoint([tmp_path / "a", tmp_path / "c"]) is None


def test_damage_falls_back(tmp_path):
    """Truncated or flipped anywhere: refused by hash, never a wrong load or another error."""
    rng = random.Random(0)
    write_checkpoint(tmp_path, 10, {"s": 1})
    folder = write_checkpoint(tmp_path, 20, TREE)
    for name in ("tensors.safetensors", "state.json", "array-0.npy", "manifest.json"):
        whole = (folder / name).read_bytes()
        for trial in range(30):
            data = bytearray(whole)
            if trial % 2:
                data = data[: rng.randrange(len(data))]
            else:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(data)
            warned = []
            step, (tree,) = newest_checkpoint([tmp_path], warned.append)
            # A flip in the manifest's white space changes nothing; otherwise the one before serves.
            assert (step == 10 and tree == {"s": 1} and warned) or same(tree, TREE)
            assert name == "manifest.json" or step == 10
        (folder / name).write_bytes(whole)
    os.remove(folder / "manifest.json")
    assert newest_checkpoint([tmp_path])[0] == 10


def test_large_arrays_are_not_copied_in_memory(tmp_path):
    """A replay of 200 MB is saved within a few MB."""
    import resource

    array = np.ones((50_000_000,), np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_checkpoint(tmp_path, 10, {"replay": array})
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 80_000  # kB
    assert np.array_equal(read_checkpoint(tmp_path, 10)["replay"], array)


@pytest.mark.parametrize("call", range(9))
def test_failure_inside_the_write_keeps_the_old_one(tmp_path, monkeypatch, call):
    """A disk that fills up at any moment: one OSError, the checkpoint before stays good."""
    write_checkpoint(tmp_path, 10, {"s": 1})
    count = iter(range(100))
    real = os.fsync

    def fsync(fd):
        if next(count) == call:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    try:
        write_checkpoint(tmp_path, 20, TREE)
    except OSError as e:
        assert e.errno == 28
    monkeypatch.undo()
    step, (tree,) = newest_checkpoint([tmp_path])
    assert (step, tree) == (10, {"s": 1}) or (step == 20 and same(tree, TREE))
    write_checkpoint(tmp_path, 20, TREE)
    assert same(read_checkpoint(tmp_path, 20), TREE)


def test_nothing_is_unpickled(tmp_path):
    """Foreign content ends in one line, no code runs."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    folder = write_checkpoint(tmp_path, 10, TREE)
    data = pickle.dumps(Bomb())
    (folder / "tensors.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    import hashlib

    manifest["sha256"]["tensors.safetensors"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="unreadable checkpoint") as e:
        read_checkpoint(tmp_path, 10)
    assert "\n" not in str(e.value) and not (tmp_path / "canary").exists()
