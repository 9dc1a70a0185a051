"""The C functions of the kernel library: found by name, given addresses, and their complaints raised."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import MaxError

Encoding = Literal["float32", "bfloat16", "q8_0", "q4_0", "q4_k", "q6_k"]
Epilogue = Literal["none", "bias", "swiglu", "geglu_tanh", "geglu_erf"]

int64, pointer = ctypes.c_int64, ctypes.c_void_p

_ABI = 5


class Functions:
    """A loaded library, of which each subclass wraps a part."""

    TEXTS: tuple[str, ...] = ()
    """The functions of the part that return a C string: most a complaint, or null when there is none."""

    def __init__(self, path: Path) -> None:
        """Loads `path`. Raises MaxError if it is of another version."""
        self.lib = ctypes.CDLL(str(path))
        if self.function("abi")() != _ABI:
            raise MaxError(f"{path} was built from other sources", "Install the package anew: pip install .")
        for kind in type(self).__mro__:
            for name in kind.__dict__.get("TEXTS", ()):
                self.function(name).restype = ctypes.c_char_p

    def function(self, name: str) -> Any:
        """The function `max_kernels_<name>`."""
        return getattr(self.lib, f"max_kernels_{name}")


def address(array: np.ndarray, dtype: Any, writable: bool = False) -> int:
    """Where the array's elements start. Raises ValueError unless they are contiguous, of `dtype`, writable if asked."""
    if array.dtype != dtype or not array.flags.c_contiguous or (writable and not array.flags.writeable):
        raise ValueError(f"expected a contiguous array of {np.dtype(dtype)}, got {array.dtype}")
    return array.ctypes.data


def check(problem: bytes | None) -> None:
    """Raises ValueError with what a function complains about."""
    if problem is not None:
        raise ValueError(problem.decode())
