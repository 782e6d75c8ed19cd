"""Matrix products inside compiled loops, by the BLAS that torch brings, else by SciPy's.

torch's wheels for Linux on x86 hold MKL and export its Fortran names; elsewhere SciPy, where it is
installed, has the same functions. Measured at 256 x 256 x 256 in float32: MKL 1.2 times OpenBLAS.
`ready` says whether there are any.

numba keeps compiled loops on disk until the file they stand in changes: with this file, change
compiled_mlp.py too.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch

_NAMES = {"float32": "sgemm", "float64": "dgemm"}
_WORDS = 13  # arguments of a Fortran gemm, all by reference


def _address(name: str) -> int:
    """Where a gemm lies in memory; 0 where there is none."""
    for path in Path(torch.__file__).parent.glob("lib/libtorch_cpu.so"):
        function = getattr(ctypes.CDLL(str(path)), f"{name}_", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    try:
        from numba.extending import get_cython_function_address

        return int(get_cython_function_address("scipy.linalg.cython_blas", name))
    except (ImportError, ValueError):
        return 0


def _external() -> dict[str, Any]:
    """Callable from compiled loops, by dtype; empty where any is lacking."""
    try:
        import llvmlite.binding
        from numba import types
    except ImportError:
        return {}
    found = {}
    for dtype, name in _NAMES.items():
        address = _address(name)
        if not address:
            return {}
        llvmlite.binding.add_symbol(f"perennial_{name}", address)
        signature = types.void(*[types.voidptr] * _WORDS)
        found[dtype] = types.ExternalFunction(f"perennial_{name}", signature)
    return found


_GEMM = _external()
ready = bool(_GEMM)


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray, turn_a: bool, turn_b: bool) -> None:
    """`out = a @ b` of matrices whose rows are contiguous, each transposed where asked; only inside
    compiled loops."""
    raise TypeError("product is for compiled loops; elsewhere take `a @ b`")


if ready:
    from numba.extending import overload

    @overload(product)
    def _product(a, b, out, turn_a, turn_b):  # type: ignore[no-untyped-def]
        gemm = _GEMM[str(out.dtype)]

        # Fortran reads rows as columns: it computes the transposed product of the other order.
        def run(a, b, out, turn_a, turn_b):  # type: ignore[no-untyped-def]
            rows, columns = out.shape
            inner = a.shape[0] if turn_a else a.shape[1]
            if rows == 0 or columns == 0 or inner == 0:  # which the BLAS would complain about
                out[:] = 0
                return
            size = out.itemsize
            words = np.array(
                [
                    columns, rows, inner,
                    b.strides[0] // size, a.strides[0] // size, out.strides[0] // size,
                ],
                np.int32,
            )  # fmt: skip
            scales = np.array([1, 0], out.dtype)
            letters = np.array([84 if turn_b else 78, 84 if turn_a else 78], np.uint8)  # T, N
            gemm(
                letters.ctypes, letters[1:].ctypes,
                words.ctypes, words[1:].ctypes, words[2:].ctypes,
                scales.ctypes, b.ctypes, words[3:].ctypes, a.ctypes, words[4:].ctypes,
                scales[1:].ctypes, out.ctypes, words[5:].ctypes,
            )  # fmt: skip

        return run
