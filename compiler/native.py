"""The kernels for CPUs: finds the library that the install built, chooses its instruction set, names its XLA handlers.

The library is C++ (compiler/kernels/) without any Python in it, so it is loaded with ctypes. Where it was not built,
`library()` is None and every graph is plain XLA. Imports no jax.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from .. import ConfigError
from .native_calls import DirectCalls
from .native_functions import pointer
from .native_packing import Packing

ISA_VARIABLE = "MAX_KERNELS_ISA"
ISAS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
"""The instruction sets that the kernels are compiled for, least first; MAX_KERNELS_ISA forces one, "none" plain XLA."""

HINTS_VARIABLE = "MAX_KERNELS_HINTS"
HINTS = ("none", "first", "second")
"""For which cache MAX_KERNELS_HINTS makes the kernels ask for weights ahead; what suits the CPU where it is not set."""

HANDLERS = (
    "max_matmul_f32_v2",
    "max_matmul_bf16_v2",
    "max_matmul_q8_0_v2",
    "max_matmul_q4_0_v1",
    "max_matmul_q4_k_v1",
    "max_matmul_q6_k_v1",
    "max_embed_v1",
    *("max_attention_v3", "max_argmax_v2", "max_sample_v2", "max_logprobs_v2"),
    *("max_rms_norm_v1", "max_add_rms_norm_v1"),
    *("max_decoder_layers_v1", "max_lazy_zeros_v1"),
)
"""The XLA custom calls, each with the version of its arguments; docs/adr/0006 describes them."""


class Library(Packing, DirectCalls):
    """The loaded kernels; `library()` makes the one of the process."""

    TEXTS = ("isa", "select")

    def __init__(self, path: Path) -> None:
        """Loads `path`. Raises MaxError if it is of another version, ConfigError for a bad MAX_KERNELS_ variable."""
        super().__init__(path)
        hints = os.environ.get(HINTS_VARIABLE)
        if hints and hints not in HINTS:
            raise ConfigError(f"{HINTS_VARIABLE} is '{hints}'", f"Set it to one of {', '.join(HINTS)}, or not at all.")
        self.select("")

    @property
    def isa(self) -> str:
        """The instruction set in use, one of ISAS."""
        return self.function("isa")().decode()

    def supports(self, isa: str) -> bool:
        """Whether this CPU can run the kernels for `isa`."""
        return bool(self.function("supports")(isa.encode()))

    def select(self, isa: str) -> None:
        """Uses the kernels for `isa` from now on; "" means those of MAX_KERNELS_ISA or else the CPU's best.

        Raises ConfigError if there is no such instruction set or this CPU lacks it.
        """
        problem = self.function("select")(isa.encode())
        if problem is not None:
            able = ", ".join(name for name in ISAS if self.supports(name))
            raise ConfigError(problem.decode(), f"Unset {ISA_VARIABLE}, or set it to one of: {able}.")

    @property
    def num_threads(self) -> int:
        """Threads that a kernel uses at most: those that were set, or else the CPUs of the process."""
        return self.function("num_threads")()

    def set_num_threads(self, threads: int) -> None:
        """Changes `num_threads`, also for kernels that are in use; 0 means the CPUs of the process."""
        self.function("set_num_threads")(threads)

    def handlers(self) -> dict[str, Any]:
        """The XLA handlers by name, as the capsules that `jax.ffi.register_ffi_target` takes."""
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = ctypes.py_object, [pointer, ctypes.c_char_p, pointer]
        address = {name: ctypes.cast(getattr(self.lib, name), pointer) for name in HANDLERS}
        return {name: capsule(address[name], b"xla._CUSTOM_CALL_TARGET", None) for name in HANDLERS}


def library_path() -> Path | None:
    """The library beside this file, if the install built it; not what another Python's install has left there."""
    named = (Path(__file__).with_name(f"_kernels{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in named if path.is_file()), None)


def how_to_get() -> str:
    """What to do where `library()` is None."""
    if library_path() is not None:
        return f"Unset {ISA_VARIABLE}, which turns the kernels off."
    return "Install a C++ compiler (g++ or clang++), then install the package anew."


@cache
def library() -> Library | None:
    """The kernels of this process; None where the install found no compiler, or where MAX_KERNELS_ISA is "none".

    Raises what `Library` raises.
    """
    path = None if os.environ.get(ISA_VARIABLE) == "none" else library_path()
    return Library(path) if path is not None else None
