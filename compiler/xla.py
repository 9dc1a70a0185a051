"""The adapter to XLA, as far as a warm start needs it: a client, buffers, and executables loaded from their bytes.

Needs jaxlib alone (0.1 s to import). This file and the others called xla_* are the only ones that touch private names
of jax and jaxlib; tests/unit/compiler/test_xla.py pins every such name.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from .. import CacheError
from . import native, threads
from .counters import COUNTERS

if TYPE_CHECKING:
    from .graph import TensorType

Buffer = Any
"""An array on a device (jaxlib's ArrayImpl), as executables take and return them; on a mesh, one on each device."""


@functools.cache
def jaxlib() -> Any:
    """jaxlib's client module, imported when something is loaded or compiled."""
    from jaxlib import xla_client

    return xla_client


class Host(NamedTuple):
    """Where the buffers and executables of this process live: a device, or a mesh that executes one program together.

    members: every device, with the sharding of an array on it alone; sharding: of a buffer
    """

    client: Any
    devices: Any
    members: tuple[tuple[Any, Any], ...]
    sharding: Any


_client_factories: list[tuple[Callable[[], Any], int]] = []


def use_client(make: Callable[[], Any], devices: int = 1) -> None:
    """Has the buffers and executables of this process live on the first devices of another client than the CPU's;
    before the first one."""
    assert not host.cache_info().currsize, "a client is in use already"
    _client_factories.append((make, devices))


@functools.cache
def host() -> Host:
    """The client of this process: the CPU's, with the kernels registered where they were built, or a device's."""
    make, devices = _client_factories[-1] if _client_factories else (_cpu_client, 1)
    return _on(make(), devices)


def _on(client: Any, count: int) -> Host:
    devices = client.local_devices()[:count]
    members = tuple((device, jaxlib()._xla.SingleDeviceSharding(device)) for device in devices)
    together = jaxlib().DeviceList(tuple(devices))
    if count == 1:
        return Host(client, together, members, members[0][1])
    # A program knows its own part of an array alone: its shape is the buffer's.
    return Host(client, together, members, jaxlib()._xla.GSPMDSharding(together, jaxlib().HloSharding.manual()))


def _cpu_client() -> Any:
    xla_client = jaxlib()
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
    return list(host().client.local_devices())


def start_client() -> None:
    """Creates the client now, so that a caller may overlap it with reading files."""
    host()


def memory_limit() -> int | None:
    """The bytes that the client may take of each device, the least of them; None where it does not say, as on a CPU."""
    stats = [device.memory_stats() if _client_factories else None for device, _ in host().members]
    return min((found["bytes_limit"] for found in stats if found and "bytes_limit" in found), default=None)


# --- buffers -------------------------------------------------------------------------------------------------------


class _Aval:
    """What jaxlib asks of an abstract value."""

    __slots__ = ("dtype", "shape", "weak_type")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype, self.weak_type = shape, dtype, False


def shares_memory() -> bool:
    """Whether buffers may share an array's memory, and calls have read it when they return: on a CPU."""
    return not _client_factories


def put(array: np.ndarray) -> Buffer:
    """The array as a buffer of the CPU client, without a copy when it starts at a 64-byte boundary.

    The buffer keeps the array alive; the array must not be written to until every call that reads it has finished.
    On a mesh every device gets it.
    """
    return put_parts(array for _ in host().members)


def put_parts(arrays: Iterable[np.ndarray]) -> Buffer:
    """The arrays, one for each device of the mesh and all of one type, as one buffer. Each is taken when its turn has
    come, so that they may be cut one after the other."""
    return _put(arrays, jaxlib()._xla.HostBufferSemantics.ZERO_COPY)


def put_owned(shape: tuple[int, ...], dtype: str) -> Buffer:
    """Zeros in memory that belongs to the client: only such memory can be donated without a copy."""
    zeros = np.zeros(shape, numpy_dtype(dtype))
    return _put((zeros for _ in host().members), jaxlib()._xla.HostBufferSemantics.IMMUTABLE_ONLY_DURING_CALL)


def _put(arrays: Iterable[np.ndarray], semantics: Any) -> Buffer:
    parts = [
        jaxlib()._xla.batched_device_put(
            _Aval(array.shape, array.dtype), sharding, [array], [device], True, False, semantics, enable_x64=True
        )
        for array, (device, sharding) in zip(arrays, host().members, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return jaxlib()._xla.ArrayImpl(parts[0].aval, host().sharding, parts, True, _skip_checks=True)


def _first(buffer: Buffer) -> Buffer:
    """The buffer's part on the first device."""
    return buffer._arrays[0] if len(host().members) > 1 else buffer


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

    A dtype that numpy itself lacks, such as bfloat16, is copied: numpy's DLPack does not know it. Of a buffer on a mesh
    it is the first device's.
    """
    wait([buffer])
    buffer = _first(buffer)
    if _client_factories:
        return buffer._single_device_array_to_np_array_did_copy()[0]
    if buffer.aval.dtype.kind == "V":
        return _copied(buffer)
    return np.from_dlpack(_DLPack(jaxlib()._xla.buffer_to_dlpack_managed_tensor(buffer)))


def _copied(buffer: Buffer) -> np.ndarray:
    dtype, shape = buffer.aval.dtype, buffer.aval.shape
    data = ctypes.string_at(address(buffer), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def wait(buffers: Sequence[Buffer]) -> None:
    """Returns when all buffers have been computed."""
    jaxlib()._xla.batched_block_until_ready(list(buffers))


def address(buffer: Buffer) -> int:
    """Where the buffer's memory starts: equal for a donated argument and the result that took its place."""
    return _first(buffer).unsafe_buffer_pointer()


_initialized: set[str] = set()
_initializing = threading.Lock()


@contextmanager
def first_alone(kind: Literal["compile", "load"]) -> Iterator[None]:
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
        handler, sharding = jaxlib()._xla.array_result_handler, host().sharding
        self._handlers = [handler(_Aval(type.shape, numpy_dtype(type.dtype)), sharding, True) for type in results]
        self._loaded = loaded

    def __call__(self, arguments: Sequence[Buffer]) -> list[Buffer]:
        return self._loaded.execute_sharded(arguments).consume_with_handlers(self._handlers)


def load_executable(data: bytes, results: Sequence[TensorType]) -> Executable:
    """Loads PJRT bytes whose hash has been checked, with the types of its results.

    Raises CacheError when PJRT refuses them.
    """
    here = host()
    try:
        with first_alone("load"):
            loaded = here.client.deserialize_executable(data, here.devices, None)
    except jaxlib()._xla.JaxRuntimeError as error:
        raise CacheError(f"an executable cannot be loaded: {error}", "It will be compiled anew.") from error
    COUNTERS.loaded += 1
    return Executable(loaded, results)
