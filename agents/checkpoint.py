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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

_KEEP = 2
_TENSOR, _ARRAY, _FILE = "__tensor__", "__array__", "__file__"
_LARGE = 1 << 22  # bytes from which an array is written on its own, without a copy in memory
_FORMAT = 1


class _Parts:
    """What a tree is made of on disk: small tensors together, each large array in a file."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def split(self, value: Any, path: str = "") -> Any:
        """Plain values stay; tensors and arrays move here and leave a reference."""
        if isinstance(value, torch.Tensor):
            self.tensors[path] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: path}
        if isinstance(value, np.ndarray):
            if value.nbytes >= _LARGE:
                self.arrays[name := f"array-{len(self.arrays)}.npy"] = value
                return {_FILE: name}
            self.tensors[path] = torch.from_numpy(np.array(value, order="C"))
            return {_ARRAY: path}
        if isinstance(value, dict):
            assert all(isinstance(k, str) for k in value), f"{path}: keys must be strings"
            return {k: self.split(v, f"{path}/{k}" if path else k) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.split(v, f"{path}/{i}") for i, v in enumerate(value)]
        if isinstance(value, np.generic):
            return value.item()
        return value


def _join(value: Any, tensors: dict[str, torch.Tensor], folder: Path) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_ARRAY}:
            return tensors[value[_ARRAY]].numpy()
        if set(value) == {_FILE}:
            # Mapped, not read: a replay of many GB must not stand in memory twice.
            return np.load(folder / Path(value[_FILE]).name, mmap_mode="r", allow_pickle=False)
        return {k: _join(v, tensors, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_join(v, tensors, folder) for v in value]
    return value


def _pruned(tree: dict[str, Any], without: str | None) -> dict[str, Any]:
    """The plain tree with None in the place of the path `without`, such as "agent/replay"."""
    if without is None:
        return tree
    key, _, rest = without.partition("/")
    if key not in tree:
        return tree
    return {**tree, key: _pruned(tree[key], rest) if rest else None}


def _files(value: Any) -> Iterator[str]:
    """Names of the large arrays' files that a plain tree refers to."""
    if isinstance(value, dict) and set(value) == {_FILE}:
        yield value[_FILE]
    elif isinstance(value, dict | list):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _files(v)


class _Hashed:
    """A file that hashes what is written to it; large arrays pass through in pieces, uncopied."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def close(self) -> str:
        """Flush to the disk; the hash of the content."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._hash.hexdigest()


def _write(path: Path, content: bytes | np.ndarray) -> str:
    """Write bytes, or an array in numpy's format; the SHA-256 of the file."""
    file = _Hashed(path)
    try:
        if isinstance(content, bytes):
            file.write(content)
        else:
            np.lib.format.write_array(file, content, allow_pickle=False)
    finally:
        digest = file.close()
    return digest


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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
    parts = _Parts()
    plain = parts.split(tree)
    files: dict[str, bytes | np.ndarray] = {
        "tensors.safetensors": save(parts.tensors),
        "state.json": json.dumps(plain).encode(),
        **parts.arrays,
    }
    unfinished = root / f".{env_steps}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        hashes = {name: _write(unfinished / name, content) for name, content in files.items()}
        manifest = {"format": _FORMAT, "env_steps": env_steps, "sha256": hashes}
        _write(unfinished / "manifest.json", json.dumps(manifest, indent=1).encode())
    except OSError:
        # A full disk: give the space back, keep the checkpoints before.
        shutil.rmtree(unfinished, ignore_errors=True)
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


def read_checkpoint(seed_dir: Path, env_steps: int, without: str | None = None) -> dict[str, Any]:
    """The tree written at `env_steps`; ValueError in one line when a file is missing or damaged.

    Where only a part is wanted: what stands at the path `without` is None, and the large files
    that it alone needs are not looked at.
    """
    folder = seed_dir / "checkpoints" / str(env_steps)
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        hashes = manifest["sha256"]
        if manifest["format"] != _FORMAT or manifest["env_steps"] != env_steps:
            raise ValueError(f"{folder}: manifest.json is of another format or step")
        unread = set()
        if without is not None:
            whole = json.loads((folder / "state.json").read_bytes())
            unread = set(_files(whole)) - set(_files(_pruned(whole, without)))
        for name in {"tensors.safetensors", "state.json", *hashes} - unread:
            if _sha256(folder / Path(name).name) != hashes[name]:
                raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
        tensors = load((folder / "tensors.safetensors").read_bytes())
        plain = json.loads((folder / "state.json").read_bytes())
        return _join(_pruned(plain, without), tensors, folder)
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
    seed_dirs: list[Path], warn: Any = None, without: str | None = None
) -> tuple[int, list[dict[str, Any]]] | None:
    """The newest env_steps at which all of `seed_dirs` have a good checkpoint, and the trees.

    `without`: see `read_checkpoint`.
    """
    common = set.intersection(*(set(checkpoints(d)) for d in seed_dirs))
    for env_steps in sorted(common, reverse=True):
        try:
            return env_steps, [read_checkpoint(d, env_steps, without) for d in seed_dirs]
        except ValueError as e:
            if warn is not None:
                warn(f"{e}; falling back to the checkpoint before")
    return None
