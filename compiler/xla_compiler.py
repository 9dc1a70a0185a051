"""The adapter to XLA where it compiles: options, errors, and what is kept of an executable that was just made."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import CompileError
from .counters import COUNTERS
from .xla import first_alone, host, jaxlib


@dataclass(frozen=True)
class Compiled:
    """What one compilation gives; bytes of memory are the device's."""

    executable: bytes
    flops: float
    bytes_accessed: float
    memory: dict[str, int]
    optimized_hlo: str


def compile_stablehlo(
    module: bytes, name: str, dump_to: str | None = None, debug_options: Mapping[str, str | bool | int] | None = None
) -> Compiled:
    """Compiles StableHLO bytecode for the client of this process; XLA's own dumps go to `dump_to`. Raises CompileError.

    Releases the GIL while it compiles.
    """
    here = host()
    # LLVM IR only: XLA writes the emitters' own MLIR passes from several threads at once and crashes.
    dump = dump_options(dump_to, emitters="llvm")

    def compile(more: Mapping[str, str | bool | int]) -> Any:
        options = compile_options({**(debug_options or {}), **more}, len(here.members))
        return here.client.compile_and_load(module, here.devices, options)

    with compile_errors(name), first_alone("compile"):
        return describe(without_dumps(compile, dump))


def without_dumps(
    compile: Callable[[Mapping[str, str | bool | int]], Any], dump: Mapping[str, str | bool | int]
) -> Any:
    """What `compile` makes with further options: of two compilations where XLA dumps, the one that did not.

    XLA writes the folder of its dumps into the executable, and makes that folder again wherever this is loaded.
    """
    if dump:
        compile(dump)
    return compile({})


def compile_options(overrides: Mapping[str, str | bool | int], devices: int = 1) -> Any:
    """jaxlib's options of one compilation, with XLA's debug options in `overrides` set.

    devices: of the mesh; all execute the program, each as a replica of its own
    """
    options = jaxlib().CompileOptions()
    options.env_option_overrides = list(overrides.items())
    if devices > 1:
        options.num_replicas = devices
        options.device_assignment = jaxlib().DeviceAssignment.create(np.arange(devices)[:, None])
    return options


def dump_options(folder: str | None, *, emitters: str) -> dict[str, str | bool | int]:
    """XLA's options that dump HLO, and the code of the emitters that match, to a folder; none without one."""
    if folder is None:
        return {}
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": emitters}


@contextmanager
def compile_errors(name: str) -> Iterator[None]:
    """Turns what XLA says against a module into a CompileError."""
    try:
        yield
    except jaxlib()._xla.JaxRuntimeError as error:
        raise CompileError(
            f"XLA cannot compile {name}: {error}", "Read its StableHLO with MODULAR_DEBUG=ir-output-dir=DIR."
        ) from error


def describe(executable: Any) -> Compiled:
    """What is kept of an executable that was just compiled, here or for another target."""
    COUNTERS.compiled += 1
    cost = _cost(executable)
    stats = executable.get_compiled_memory_stats()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return Compiled(
        executable.serialize(),
        float(cost.get("flops", 0.0)),
        float(cost.get("bytes accessed", 0.0)),
        memory,
        executable.hlo_modules()[0].to_string(),
    )


def _cost(executable: Any) -> dict[str, float]:
    """XLA's own estimate; where a plugin gives none, that of the compiled HLO."""
    try:
        return executable.cost_analysis()
    except jaxlib()._xla.JaxRuntimeError:
        return jaxlib()._xla.hlo_module_cost_analysis(_plain_client(), executable.hlo_modules()[0])


@functools.cache
def _plain_client() -> Any:
    """A CPU client without kernels: estimates ask it for the sizes of shapes."""
    return jaxlib().make_cpu_client()


def release_memory() -> None:
    """Gives memory that compilation has freed back to the system, before weights are read beside it."""
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's own; elsewhere the memory stays with the process
        ctypes.CDLL(None).malloc_trim(0)
