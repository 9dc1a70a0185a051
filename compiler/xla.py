"""The adapter to XLA: with xla_targets.py the only file that touches private names of jax and jaxlib.

Loading and calling executables needs jaxlib alone (0.1 s to import); jax itself is imported by the functions that trace
and lower. tests/unit/compiler/test_xla.py pins every private name that is used here.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from .. import CacheError, CompileError
from . import native, threads
from .counters import COUNTERS

if TYPE_CHECKING:
    from jaxlib.mlir import ir

    from .graph import Graph, TensorType

Buffer = Any
"""An array on a device (jaxlib's ArrayImpl), as executables take and return them."""


@functools.cache
def _jaxlib() -> Any:
    """jaxlib's client module, imported when something is loaded or compiled."""
    from jaxlib import xla_client

    return xla_client


class _Host(NamedTuple):
    client: Any
    device: Any
    devices: Any
    sharding: Any


_client_factories: list[Callable[[], Any]] = []


def use_client(make: Callable[[], Any]) -> None:
    """Has the buffers and executables of this process live on another client than the CPU's; before the first one."""
    assert not _host.cache_info().currsize, "a client is in use already"
    _client_factories.append(make)


@functools.cache
def _host() -> _Host:
    """The client of this process: the CPU's, with the kernels registered where they were built, or a device's."""
    return _on(_client_factories[-1]() if _client_factories else _cpu_client())


def _on(client: Any) -> _Host:
    xla_client, device = _jaxlib(), client.local_devices()[0]
    return _Host(client, device, xla_client.DeviceList((device,)), xla_client._xla.SingleDeviceSharding(device))


def _cpu_client() -> Any:
    xla_client = _jaxlib()
    # A call computes on its caller's thread. Handed to one of XLA's, it would compete with the kernels' own for the
    # CPUs: a decoding step of 349 M bfloat16 weights takes 10.6 ms on two CPUs this way and 15.3 ms the other.
    with threads.told_to_xla():
        client = xla_client.make_cpu_client(asynchronous=False)
    library = native.library()
    for name, handler in library.handlers().items() if library else ():
        xla_client.register_custom_call_target(name, handler, platform="cpu", api_version=1)
    return client


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a TensorType's dtype name."""
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def host_devices() -> list[Any]:
    """The devices of the CPU client."""
    return list(_host().client.local_devices())


def start_client() -> None:
    """Creates the client now, so that a caller may overlap it with reading files."""
    _host()


# --- buffers -------------------------------------------------------------------------------------------------------


class _Aval:
    """What jaxlib asks of an abstract value."""

    __slots__ = ("dtype", "shape", "weak_type")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype, self.weak_type = shape, dtype, False


def put(array: np.ndarray) -> Buffer:
    """The array as a buffer of the CPU client, without a copy when it starts at a 64-byte boundary.

    The buffer keeps the array alive; the array must not be written to until every call that reads it has finished.
    """
    host = _host()
    return _jaxlib()._xla.batched_device_put(
        _Aval(array.shape, array.dtype), host.sharding, [array], [host.device], True, False, enable_x64=True
    )


def put_owned(shape: tuple[int, ...], dtype: str) -> Buffer:
    """Zeros in memory that belongs to the client: only such memory can be donated without a copy."""
    host = _host()
    zeros = np.zeros(shape, numpy_dtype(dtype))
    semantics = _jaxlib()._xla.HostBufferSemantics.IMMUTABLE_ONLY_DURING_CALL
    return _jaxlib()._xla.batched_device_put(
        _Aval(shape, zeros.dtype), host.sharding, [zeros], [host.device], True, False, semantics, enable_x64=True
    )


class _DLPack:
    """A DLPack capsule in the form that `np.from_dlpack` takes."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU, device 0


def fetch(buffer: Buffer) -> np.ndarray:
    """Waits for the buffer and returns it as a read-only array: on CPU one that shares its memory.

    A dtype that numpy itself lacks, such as bfloat16, is copied: numpy's DLPack does not know it.
    """
    xla = _jaxlib()._xla
    xla.batched_block_until_ready([buffer])
    if _client_factories:
        return buffer._single_device_array_to_np_array_did_copy()[0]
    if buffer.aval.dtype.kind == "V":
        return _copied(buffer)
    return np.from_dlpack(_DLPack(xla.buffer_to_dlpack_managed_tensor(buffer)))


def _copied(buffer: Buffer) -> np.ndarray:
    dtype, shape = buffer.aval.dtype, buffer.aval.shape
    data = ctypes.string_at(address(buffer), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def wait(buffers: Sequence[Buffer]) -> None:
    """Returns when all buffers have been computed."""
    _jaxlib()._xla.batched_block_until_ready(list(buffers))


def address(buffer: Buffer) -> int:
    """Where the buffer's memory starts: equal for a donated argument and the result that took its place."""
    return buffer.unsafe_buffer_pointer()


_initialized: set[str] = set()
_initializing = threading.Lock()


@contextmanager
def _first_alone(kind: Literal["compile", "load"]) -> Iterator[None]:
    """Lets the first compilation of a process and its first load run alone.

    Two first ones at once race in XLA's and LLVM's own initialization: 3 of 24 processes crashed, none of 24 with this.
    A load does not initialize what compilations need: every process that loaded first and then compiled two crashed.
    """
    if kind not in _initialized:
        with _initializing:
            if kind not in _initialized:
                yield
                _initialized.add(kind)
                return
    yield


# --- executables ---------------------------------------------------------------------------------------------------


class Executable:
    """A loaded executable. Calls are not checked here: PJRT compares byte sizes only, `runtime.Model` checks types."""

    def __init__(self, loaded: Any, results: Sequence[TensorType]) -> None:
        # Without these handlers jaxlib would import jax to wrap the results.
        handler, sharding = _jaxlib()._xla.array_result_handler, _host().sharding
        self._handlers = [handler(_Aval(type.shape, numpy_dtype(type.dtype)), sharding, True) for type in results]
        self._loaded = loaded

    def __call__(self, arguments: list[Buffer]) -> list[Buffer]:
        return self._loaded.execute_sharded(arguments).consume_with_handlers(self._handlers)


def load_executable(data: bytes, results: Sequence[TensorType]) -> Executable:
    """Loads PJRT bytes whose hash has been checked, with the types of its results.

    Raises CacheError when PJRT refuses them.
    """
    host = _host()
    try:
        with _first_alone("load"):
            loaded = host.client.deserialize_executable(data, host.devices, None)
    except _jaxlib()._xla.JaxRuntimeError as error:
        raise CacheError(f"an executable cannot be loaded: {error}", "It will be compiled anew.") from error
    COUNTERS.loaded += 1
    return Executable(loaded, results)


@dataclass(frozen=True)
class Compiled:
    """What one compilation gives; bytes of memory are the device's."""

    executable: bytes
    flops: float
    bytes_accessed: float
    memory: dict[str, int]
    optimized_hlo: str


def compile_stablehlo(module: bytes, name: str, dump_to: str | None = None) -> Compiled:
    """Compiles StableHLO bytecode for the host CPU; XLA's own dumps go to `dump_to`. Raises CompileError.

    Releases the GIL while it compiles.
    """
    host = _host()
    # LLVM IR only: XLA writes the emitters' own MLIR passes from several threads at once and crashes.
    options = compile_options(dump_options(dump_to, emitters="llvm"))
    with compile_errors(name), _first_alone("compile"):
        loaded = host.client.compile_and_load(module, host.devices, options)
    return describe(loaded)


def compile_options(overrides: Mapping[str, str | bool | int]) -> Any:
    """jaxlib's options of one compilation, with XLA's debug options in `overrides` set."""
    options = _jaxlib().CompileOptions()
    options.env_option_overrides = list(overrides.items())
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
    except _jaxlib()._xla.JaxRuntimeError as error:
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
    except _jaxlib()._xla.JaxRuntimeError:
        return _jaxlib()._xla.hlo_module_cost_analysis(_plain_client(), executable.hlo_modules()[0])


@functools.cache
def _plain_client() -> Any:
    """A CPU client without kernels: estimates ask it for the sizes of shapes."""
    return _jaxlib().make_cpu_client()


def release_memory() -> None:
    """Gives memory that compilation has freed back to the system, before weights are read beside it."""
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's own; elsewhere the memory stays with the process
        ctypes.CDLL(None).malloc_trim(0)


# --- tracing and MLIR ----------------------------------------------------------------------------------------------


class Lowered(NamedTuple):
    """Stages 1 and 2 of a graph."""

    jaxpr: str
    stablehlo: bytes


def lower(graph: Graph, platform: str) -> Lowered:
    """Traces a graph and lowers it to StableHLO bytecode with one public function, `main`. Needs no device.

    Raises whatever `graph.forward` raises, and CompileError for outputs that do not fit the graph's state.
    """
    import jax
    from jax._src.interpreters import mlir

    _keep_plugins_out()
    arguments = graph.arguments
    shapes = [jax.ShapeDtypeStruct(argument.type.shape, argument.type.dtype) for argument in arguments]
    donated = [i for i, argument in enumerate(arguments) if argument.role == "state"]
    traced = jax.jit(_named(graph.call_flat, graph.name), keep_unused=True, donate_argnums=donated).trace(*shapes)
    COUNTERS.traced += 1
    _check_state(graph, jax.tree.leaves(traced.out_info))
    lowered: Any = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    return Lowered(str(traced.jaxpr), mlir.module_to_bytecode(lowered))


def _keep_plugins_out() -> None:
    """Spares jax the plugins of devices, which are installed to compile for and need not be here: loading them costs
    memory and time, and one fails with a traceback."""
    from jax._src import xla_bridge

    if os.environ.get("JAX_PLATFORMS") == "cpu":
        xla_bridge._plugins_registered = True


def _check_state(graph: Graph, results: Sequence[Any]) -> None:
    """The new state takes the place of the old one in memory, where PJRT compares byte sizes only."""
    for (name, type), result in zip(graph.state.items(), results[len(results) - len(graph.state) :], strict=True):
        if (str(result.dtype), result.shape) != (type.dtype, type.shape):
            raise CompileError(
                f"graph {graph.name} returns the state {name} as {result.dtype}{list(result.shape)}, not as {type}",
                "Return it with the dtype and shape that it came with.",
            )


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = name
    return call


def mlir_context() -> ir.Context:
    """An MLIR context with the dialects of JAX."""
    from jax._src.interpreters import mlir

    return mlir.make_ir_context()


def bytecode(module: ir.Module) -> bytes:
    """The module as plain MLIR bytecode, for this release only."""
    from jax._src.interpreters import mlir

    return mlir.module_to_bytecode(module)


def portable_bytecode(module: ir.Module) -> bytes:
    """The module as StableHLO portable bytecode, readable by releases of twelve weeks before and all after.

    Operations that StableHLO itself does not have yet, such as the scan of a cumulative sum on devices, are kept as
    this release writes them: then only releases that have them too can read the module.
    """
    from jaxlib.mlir.dialects import stablehlo

    window = stablehlo.StablehloCompatibilityRequirement.WEEK_12
    version = stablehlo.get_version_from_compatibility_requirement(window)
    source, serialize = bytecode(module), _jaxlib()._xla.mlir.serialize_portable_artifact
    try:
        # Unlike the dialect's own function, this one also takes the operations of CHLO, such as erf and top_k.
        return serialize(source, version, False)
    except _jaxlib()._xla.JaxRuntimeError:
        return serialize(source, version, True)


def from_portable_bytecode(data: bytes) -> ir.Module:
    """A module kept as portable bytecode, in a context of its own. Imports jaxlib's MLIR, not jax."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        return stablehlo.deserialize_portable_artifact(context, data)
