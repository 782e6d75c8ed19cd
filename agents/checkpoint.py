"""Checkpoints: a nested dict of tensors and plain values in a folder that is whole or not there.

`checkpoints/<env_steps>/` holds `tensors.safetensors`, `state.json` and, written last,
`manifest.json` with the SHA-256 of both. The folder is filled under a temporary name, every file is
flushed to disk, and the rename makes it visible. Reading checks the hashes and falls back to the
one before. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

_KEEP = 2
_TENSOR, _ARRAY = "__tensor__", "__array__"
_FORMAT = 1


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Plain values stay, tensors and arrays move to `tensors` and leave a reference."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(np.array(value, order="C"))
        return {_ARRAY: path}
    if isinstance(value, dict):
        assert all(isinstance(k, str) for k in value), f"{path}: keys must be strings"
        return {k: _split(v, f"{path}/{k}" if path else k, tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_ARRAY}:
            return tensors[value[_ARRAY]].numpy()
        return {k: _join(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    return value


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _flush_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_checkpoint(seed_dir: Path, env_steps: int, tree: dict[str, Any]) -> Path:
    """Write `tree`, nested dicts and lists of tensors, arrays and JSON values, as the newest."""
    root = seed_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    plain = _split(tree, "", tensors)
    files = {"tensors.safetensors": save(tensors), "state.json": json.dumps(plain).encode()}
    manifest = {
        "format": _FORMAT,
        "env_steps": env_steps,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    unfinished = root / f".{env_steps}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        for name, data in files.items():
            _write(unfinished / name, data)
        _write(unfinished / "manifest.json", json.dumps(manifest, indent=1).encode())
    except OSError:
        shutil.rmtree(
            unfinished, ignore_errors=True
        )  # a full disk: give the space back, keep the old ones
        raise
    _flush_folder(unfinished)
    final = root / str(env_steps)
    shutil.rmtree(
        final, ignore_errors=True
    )  # only a damaged one can be in the way: see `newest_checkpoint`
    unfinished.rename(final)
    _flush_folder(root)
    for old in checkpoints(seed_dir)[:-_KEEP]:
        shutil.rmtree(root / str(old), ignore_errors=True)
    return final


def checkpoints(seed_dir: Path) -> list[int]:
    """env_steps of the checkpoints of a seed, oldest first, without a look inside."""
    root = seed_dir / "checkpoints"
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and p.is_dir())


def read_checkpoint(seed_dir: Path, env_steps: int) -> dict[str, Any]:
    """The tree written at `env_steps`; ValueError in one line when a file is missing or damaged."""
    folder = seed_dir / "checkpoints" / str(env_steps)
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        hashes = manifest["sha256"]
        if manifest["format"] != _FORMAT or manifest["env_steps"] != env_steps:
            raise ValueError(f"{folder}: manifest.json is of another format or step")
        data = {
            name: (folder / name).read_bytes() for name in ("tensors.safetensors", "state.json")
        }
        for name, content in data.items():
            if hashlib.sha256(content).hexdigest() != hashes[name]:
                raise ValueError(
                    f"{folder / name} is damaged: its SHA-256 differs from manifest.json"
                )
        return _join(json.loads(data["state.json"]), load(data["tensors.safetensors"]))
    except (
        OSError,
        KeyError,
        TypeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        SafetensorError,
        RecursionError,
    ) as e:
        raise ValueError(
            f"{folder}: unreadable checkpoint ({type(e).__name__}: {e})".replace("\n", " ")
        ) from e


def newest_checkpoint(
    seed_dirs: list[Path], warn: Any = None
) -> tuple[int, list[dict[str, Any]]] | None:
    """The newest env_steps at which all of `seed_dirs` have a good checkpoint, and the trees."""
    common = set.intersection(*(set(checkpoints(d)) for d in seed_dirs))
    for env_steps in sorted(common, reverse=True):
        try:
            return env_steps, [read_checkpoint(d, env_steps) for d in seed_dirs]
        except ValueError as e:
            if warn is not None:
                warn(f"{e}; falling back to the checkpoint before")
    return None
