"""Random numbers of interventions: a pure function of (key, counter), the same on every device.

A splitmix64-like hash (Steele, Lea & Flood 2014) in wrapping 64-bit integers, written twice with
the same bits: for tensors and for the host's integers. Nothing is taken from any other random
stream, a stream's whole state is its key and its counter, and nothing here stops a compiler or a
CUDA graph.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit `x`."""
    x &= _MASK
    return x - 2**64 if x >= 2**63 else x


def key_of(seed: int, purpose: str) -> int:
    """The int64 key of the stream of (seed, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fold(key: Tensor, word: Tensor | int) -> Tensor:
    """A new key (or 64 random bits) from an int64 key and a counter; broadcasts."""
    golden = _signed(_GOLDEN)
    if isinstance(word, Tensor) and torch.compiler.is_compiling():
        word = word ^ 0  # inductor multiplies a range of indices without wrapping around
    x = key + (_signed(word * _GOLDEN) if isinstance(word, int) else word * golden)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_FIRST)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_SECOND)
    return x ^ ((x >> 31) & (2**33 - 1))


def fold_int(key: int, word: int) -> int:
    """`fold` on the host: unsigned result with the same bits."""
    x = (key + word * _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def to_uniform(bits: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) from 64 random bits each."""
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def to_uniform_int(bits: int) -> float:
    """`to_uniform` on the host: the same number."""
    return (bits >> 11) * 2.0**-53


class Stream:
    """Keys of S copies, folded on the host where it knows them and on the device where it does not.

    >>> key = key_of(0, "doc")
    >>> host, device = Stream.known([key]), Stream(torch.tensor([key]))
    >>> torch.equal(host.fold(3).uniform(2), device.fold(3).uniform(2))
    True
    """

    def __init__(self, keys: Tensor | None, host: tuple[int, ...] | None = None) -> None:
        self._keys, self._host = keys, host
        self._device: torch.device | None = None

    @classmethod
    def known(cls, keys: Sequence[int], device: torch.device | None = None) -> Stream:
        """From keys that the host knows."""
        stream = cls(None, tuple(keys))
        stream._device = device
        return stream

    def fold(self, word: int) -> Stream:
        """The stream under this word."""
        if self._host is None:
            return Stream(fold(self.keys, word))
        return Stream.known([fold_int(key, word) for key in self._host], self._device)

    def at(self, counters: Sequence[int]) -> Stream:
        """The stream at each copy's own counter; only where the host knows the keys."""
        assert self._host is not None
        pairs = zip(self._host, counters, strict=True)
        return Stream.known([fold_int(key, counter) for key, counter in pairs], self._device)

    @property
    def keys(self) -> Tensor:
        """int64 `[S]`."""
        if self._keys is None:
            assert self._host is not None
            self._keys = torch.tensor([_signed(key) for key in self._host], device=self._device)
        return self._keys

    def coin(self) -> Tensor:
        """One uniform float64 number per copy, `[S]`, made of the keys themselves."""
        if self._host is not None:
            coins = [to_uniform_int(key) for key in self._host]
            return torch.tensor(coins, dtype=torch.float64, device=self._device)
        return to_uniform(self.keys)

    def uniform(self, count: int) -> Tensor:
        """Uniform float64 numbers in [0, 1), `[S, count]`."""
        words = torch.arange(1, count + 1, device=self.keys.device)
        return to_uniform(fold(self.keys.unsqueeze(-1), words))

    def normal(self, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal numbers `[S, count]` (Box & Muller), two from 64 bits. None exceeds 6.7.

        Another count gives other numbers.
        """
        half = count // 2 + 1
        words = torch.arange(1, half + 1, device=self.keys.device)
        bits = fold(self.keys.unsqueeze(-1), words)
        unit = 2.0**-32
        radius = ((bits >> 32) & (2**32 - 1)).to(dtype).add_(1).mul_(unit).log_().mul_(-2).sqrt_()
        angle = (bits & (2**32 - 1)).to(dtype).mul_(2 * math.pi * unit)
        return torch.cat([radius * angle.cos(), radius * angle.sin_()], -1)[:, :count]
