"""Catches code that asks the device for a value: `.item()`, `if tensor`, shapes that depend on
values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
_OPERATIONS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "unique",
    "repeat_interleave.Tensor",
)


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(_OPERATIONS), f"{name} asks the device for a value"
        if name.startswith(("index.", "index_put", "_index_put", "index_put_")):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} with a mask: its shape depends on values"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_questions() -> Iterator[None]:
    """Within it, an attempt to read a tensor's value on the host is an AssertionError."""

    def refuse(name: str) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"Tensor.{name} asks the device for a value")

        return method

    with pytest.MonkeyPatch.context() as patch:
        for name in _METHODS:
            patch.setattr(torch.Tensor, name, refuse(name))
        with _Watch():
            yield
