"""The adapter to XLA, continued: the machines that code is compiled for, and compilers for those that are not here.

A target's plugin is loaded by path and asked for a topology; that gives devices which can be compiled for and nothing
else. Imports jaxlib alone. `TargetCompiler` is used by the compile process (compile_worker.py), where a crash stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import CompileError, ConfigError
from . import xla, xla_compiler
from .limits import DEFAULT_UTILIZATION
from .targets import Target, rocm_stubs, toolchain
from .targets.attached import attached
from .targets.cpu_features import level_features
from .targets.gpu_config import gpu_config
from .xla import jaxlib
from .xla_compiler import Compiled

XlaOptions = Mapping[str, str | bool | int]
"""XLA's debug options for one compilation, by name."""


class TargetCompiler:
    """Compiles StableHLO for one target; `compile` may be called from several threads."""

    def __init__(self, target: Target, folder: Path) -> None:
        """folder: for what the plugin has to find as a file; the compiler's own as long as it lives.

        The target's toolchain must be there (`toolchain.require`). Raises CompileError where the plugin refuses it.
        """
        self._is_cpu = target.platform == "cpu"
        self._options: dict[str, str | bool | int] = {}
        if target.platform == "cuda":
            self._options["xla_gpu_cuda_data_dir"] = str(toolchain.cuda_folder())
        try:
            topology = _cpu_topology(target) if self._is_cpu else _plugin_topology(target, folder)
            devices = topology._make_compile_only_devices()[: target.devices]
        except jaxlib()._xla.JaxRuntimeError as error:
            raise CompileError(
                f"the compiler for {target.name} does not start: {error}", "Install its packages anew."
            ) from error
        self._client, self._devices = devices[0].client, jaxlib().DeviceList(tuple(devices))
        self._num_devices = target.devices

    def compile(self, module: bytes, name: str, options: XlaOptions, dump_to: str | None = None) -> Compiled:
        """Compiles bytecode of this release; XLA's own dumps go to `dump_to`. Raises CompileError."""
        # Without the anchors XLA also writes what each pass of Triton's makes: six minutes for a model of 8B.
        dump = xla_compiler.dump_options(dump_to, emitters="llvm" if self._is_cpu else "^(llvm|ptx)$")
        if dump and not self._is_cpu:
            dump["xla_gpu_dump_llvmir"] = True

        def compile(more: XlaOptions) -> Any:
            settings = xla_compiler.compile_options({**self._options, **options, **more}, self._num_devices)
            return self._client.compile(_parse(module), self._devices, settings)

        with xla_compiler.compile_errors(name):
            return xla_compiler.describe(xla_compiler.without_dumps(compile, dump))


def _parse(module: bytes) -> Any:
    """The module in a context of its own, with every dialect that jax lowers to."""
    from jaxlib.mlir import ir
    from jaxlib.mlir._mlir_libs import _jax_mlir_ext
    from jaxlib.mlir.dialects import chlo, mhlo, sdy, stablehlo

    registry = ir.DialectRegistry()
    _jax_mlir_ext.register_dialects(registry)
    context = ir.Context()
    context.append_dialect_registry(registry)
    context.load_all_available_dialects()
    for dialect in (sdy, chlo, stablehlo):
        dialect.register_dialect(context)
    mhlo.register_mhlo_dialect(context)
    with context:
        return ir.Module.parse(module)


def _plugin_topology(target: Target, folder: Path) -> Any:
    """The topology that the target's plugin makes of its description."""
    library = toolchain.PLUGINS[target.platform].find()
    assert library is not None, "toolchain.require has been asked"
    if target.platform == "hip":
        rocm_stubs.load(library, folder)
    api = jaxlib().load_pjrt_plugin_dynamically(target.xla_platform, str(library))
    if target.platform == "tpu":
        jaxlib().initialize_pjrt_plugin("tpu")
        chips = [int(size) for size in target.topology.split("x")]
        return jaxlib().make_tfrt_tpu_c_api_device_topology(
            f"{target.arch}:{target.topology}", chips_per_host_bounds=[*chips, 1]
        )
    config = gpu_config(target)
    return jaxlib().make_c_api_device_topology(api, target.arch, target_config=config, topology=f"1x1x{target.devices}")


class DeviceCompiler:
    """Compiles StableHLO for a device of this host and with it: XLA measures which kernels are the fastest there."""

    def __init__(self, target: Target) -> None:
        """Raises ConfigError or CompileError as `use_device` does."""
        use_device(target)
        self._options: XlaOptions = {}
        if target.platform == "cuda":
            self._options = {"xla_gpu_cuda_data_dir": str(toolchain.cuda_folder())}

    def compile(self, module: bytes, name: str, options: XlaOptions, dump_to: str | None = None) -> Compiled:
        """Compiles bytecode of this release; XLA's own dumps go to `dump_to`. Raises CompileError."""
        return xla_compiler.compile_stablehlo(module, name, dump_to, {**self._options, **options})


@dataclass(frozen=True)
class DeviceUse:
    """Which devices of this host a process runs on, by their numbers, the first ones without; and which share of their
    memory it takes, 0.9 without."""

    ids: Sequence[int] = ()
    memory: float | None = None


def use_device(target: Target, libraries: Sequence[str] = (), use: DeviceUse | None = None) -> None:
    """Has this process run on as many devices as the target has; nothing for CPUs. Before anything is loaded.

    Raises ConfigError where the platform's plugin is not installed or there are fewer devices, CompileError where the
    plugin finds none.
    """
    if target.platform == "cpu":
        return
    if target.devices > 1 and (here := len(attached(target.platform))) < target.devices:
        raise ConfigError(
            f"the code for {target.name} runs on {target.devices} devices together, and this host has {here}",
            "Compile it for the devices that are here: --devices names them.",
        )
    library = toolchain.require_runtime(target, libraries)
    name = target.xla_platform

    def make() -> Any:
        try:
            jaxlib().load_pjrt_plugin_dynamically(name, str(library))
            if not jaxlib().pjrt_plugin_initialized(name):
                jaxlib().initialize_pjrt_plugin(name)
            options = {} if target.platform == "tpu" else _gpu_options(target, use or DeviceUse())
            return jaxlib().make_c_api_client(name, options)
        except jaxlib()._xla.JaxRuntimeError as error:
            raise CompileError(f"{target.name} cannot be used: {error}", "Check the device and its driver.") from error

    xla.use_client(make, target.devices)


def _gpu_options(target: Target, use: DeviceUse) -> dict[str, Any]:
    """The options of a client, which takes memory of every GPU that it sees, at once; XLA's own variables go before."""
    ids = list(use.ids or range(target.devices))
    share = {"memory_fraction": use.memory or DEFAULT_UTILIZATION}
    name = {"platform_name": "ROCM"} if target.platform == "hip" else {}
    return {**share, **jaxlib().generate_pjrt_gpu_plugin_options(), **name, "visible_devices": ids}


# --- CPUs ----------------------------------------------------------------------------------------------------------

_TOPOLOGY, _ANY_VALUE, _MACHINE = 9, 2, 5  # fields: the topology's own description, an Any; in its value, the machine


def machine(target: Target) -> dict[str, Any]:
    """The machine that XLA:CPU compiles for: LLVM's triple, CPU name and feature list."""
    if target.is_native:
        return _parse_machine(_host_topology())
    features = sorted(f"+{name}" for name in level_features(target.arch))
    return {"triple": "x86_64-unknown-linux-gnu", "cpu": target.arch, "features": features}


def _cpu_topology(target: Target) -> Any:
    """A CPU of that level: the head of this host's topology, and another machine in it."""
    host = _host_topology()
    machine_proto = b"".join(
        _message(number, text.encode())
        for number, text in enumerate(
            ("x86_64-unknown-linux-gnu", target.arch, ",".join(f"+{name}" for name in level_features(target.arch))), 1
        )
    )
    name = b"type.googleapis.com/xla.CpuTopologyProto"
    value = _message(1, b"") + _message(_MACHINE, machine_proto)
    description = _message(_TOPOLOGY, _message(1, name) + _message(_ANY_VALUE, value))
    return jaxlib()._xla.DeviceTopology.deserialize(host[: _position(host, _TOPOLOGY)] + description)


def _host_topology() -> bytes:
    return jaxlib()._xla.get_topology_for_devices(xla.host_devices()).serialize()


def _parse_machine(proto: bytes) -> dict[str, Any]:
    options = _field(_field(_field(proto, _TOPOLOGY), _ANY_VALUE), _MACHINE)
    triple, cpu, features = (_field(options, number).decode() for number in (1, 2, 3))
    return {"triple": triple, "cpu": cpu, "features": sorted(features.split(","))}


# --- protobuf, as far as it is needed here -------------------------------------------------------------------------


def _message(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _field(message: bytes, wanted: int) -> bytes:
    """The first length-delimited field with this number."""
    at = _position(message, wanted)
    _, at = _read_varint(message, at)
    length, at = _read_varint(message, at)
    return message[at : at + length]


def _position(message: bytes, wanted: int) -> int:
    """Where the first length-delimited field with this number starts."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _read_varint(message, at)
        if tag & 7 == 2:
            if tag >> 3 == wanted:
                return start
            length, at = _read_varint(message, at)
            at += length
        elif tag & 7 == 0:
            _, at = _read_varint(message, at)
        else:
            at += 8 if tag & 7 == 1 else 4
    raise CompileError(f"jaxlib's topology has no field {wanted}", "This jaxlib is not the one the project pins.")


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
