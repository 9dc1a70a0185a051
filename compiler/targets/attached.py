"""The devices of this host, as targets: asked of drivers and of the kernel, without jax and in milliseconds."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

_KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_GOOGLE, _TPUS = "0x1ae0", {"0x0063": "v5e", "0x006f": "v6e"}
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@functools.cache
def attached(platform: str) -> tuple[str, ...]:
    """The architectures of this host's devices of a platform, in the drivers' order; "sm_90" or "gfx942", say."""
    return {"cuda": _nvidia, "hip": _amd, "tpu": _google}.get(platform, tuple)()


def memory(platform: str, arch: str) -> tuple[int, ...]:
    """The bytes of memory of each device of this kind, as its driver says; empty where it is not asked."""
    return tuple(size for name, size in _nvidia_devices() if name == arch) if platform == "cuda" else ()


def _nvidia() -> tuple[str, ...]:
    return tuple(name for name, _ in _nvidia_devices())


@functools.cache
def _nvidia_devices() -> tuple[tuple[str, int], ...]:
    """Architecture and bytes of memory of each device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for device in range(count.value):
        parts, size = (ctypes.c_int(), ctypes.c_int()), ctypes.c_size_t()
        for part, attribute in zip(parts, (_CAPABILITY_MAJOR, _CAPABILITY_MINOR), strict=True):
            cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        found.append((f"sm_{parts[0].value}{parts[1].value}", size.value))
    return tuple(found)


def _amd() -> tuple[str, ...]:
    """As the kernel's driver lists them: 90402 is gfx942, the last two parts in hexadecimal."""
    found = []
    for properties in sorted(_KFD_NODES.glob("*/properties"), key=lambda path: int(path.parent.name)):
        try:
            rows = dict(line.split(maxsplit=1) for line in properties.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if version := int(rows.get("gfx_target_version", 0)):
            found.append(f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}")
    return tuple(found)


def _google() -> tuple[str, ...]:
    found = []
    for device in sorted(_PCI_DEVICES.glob("*")):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:
            continue
        if vendor == _GOOGLE and kind in _TPUS:
            found.append(_TPUS[kind])
    return tuple(found)
