"""What compiling for a platform needs installed, where it is, and how to get it. Imports neither jax nor jaxlib."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform as host_platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ... import ConfigError
from .target import Target


@dataclass(frozen=True)
class Plugin:
    """A compiler for a platform: a shared library in an installed package."""

    extra: str
    distribution: str
    module: str
    library: str

    def find(self) -> Path | None:
        """The library, or None where the package is not installed."""
        try:
            found = importlib.util.find_spec(self.module)
        except ModuleNotFoundError:
            return None
        folders = found.submodule_search_locations if found else None
        paths = (Path(folder) / self.library for folder in folders or ())
        return next((path for path in paths if path.is_file()), None)


PLUGINS = {
    "cuda": Plugin("cuda", "jax-cuda13-pjrt", "jax_plugins.xla_cuda13", "xla_cuda_plugin.so"),
    "hip": Plugin("rocm", "jax-rocm7-pjrt", "jax_plugins.xla_rocm7", "xla_rocm_plugin.so"),
    "tpu": Plugin("tpu", "libtpu", "libtpu", "libtpu.so"),
}

VENDOR_BLAS = "libcublasLt.so.13"
"""What --use-vendor-blas has the code call."""

# In the order in which they need each other.
_RUNTIME_LIBRARIES = (
    "libcudart.so.13", "libnvJitLink.so.13", "libnvrtc.so.13", VENDOR_BLAS, "libcublas.so.13", "libnccl.so.2",
    "libcupti.so.13", "libcusparse.so.12", "libcusolver.so.12", "libcufft.so.12", "libcudnn.so.9",
)  # fmt: skip
_PTXAS, _LIBDEVICE = Path("bin/ptxas"), Path("nvvm/libdevice/libdevice.10.bc")


def missing(target: Target) -> list[str]:
    """The distributions that have to be installed to compile for a target; empty where all are there."""
    plugin = PLUGINS.get(target.platform)
    if plugin is None:
        return []
    absent = [] if plugin.find() else [plugin.distribution]
    if target.platform == "cuda" and cuda_folder() is None:
        absent += ["nvidia-cuda-nvcc", "nvidia-nvvm"]
    return absent


def install_command(platform: str) -> str:
    """The one command after which `missing` is empty."""
    return f"pip install 'max-jax[{PLUGINS[platform].extra}]'"


def why_not(target: Target) -> str:
    """Why code for a target cannot be made on this host whatever is installed; empty where it can."""
    machine = host_platform.machine()
    if machine != "x86_64" and not target.is_native and target.platform in ("cpu", "hip"):
        return f"code for {target.name} is made on x86-64 hosts only, and this is {machine}"
    return ""


def require(target: Target) -> None:
    """Raises ConfigError, with what to do, unless code for this target can be made here."""
    if reason := why_not(target):
        raise ConfigError(reason, "Add --portable to keep StableHLO, which the first start there compiles.")
    if absent := missing(target):
        raise ConfigError(
            f"compiling for {target.name} needs {' and '.join(absent)}, not installed here",
            f"Run {install_command(target.platform)}, or add --portable to keep StableHLO, "
            "which the first start there compiles.",
        )
    if target.platform == "cuda":
        folder = cuda_folder()
        assert folder is not None
        _require_executable(folder / _PTXAS)


def require_runtime(target: Target, libraries: Sequence[str] = ()) -> Path:
    """The plugin that runs code for a device, with NVIDIA's libraries loaded; raises ConfigError without it.

    libraries: others that the code calls, by the names under which they are loaded
    """
    plugin = PLUGINS[target.platform]
    library = plugin.find()
    if library is None:
        extra = "cuda-run" if target.platform == "cuda" else plugin.extra
        raise ConfigError(
            f"running on {target.name} needs {plugin.distribution}, not installed here",
            f"Run pip install 'max-jax[{extra}]'.",
        )
    if target.platform == "cuda":
        for path in _nvidia_libraries():
            ctypes.CDLL(str(path))
    for name in libraries:
        try:
            ctypes.CDLL(name)
        except OSError:
            raise ConfigError(
                f"the artifact calls {name}, which is not installed here",
                "Run pip install 'max-jax[cuda-run]', or compile it without --use-vendor-blas.",
            ) from None
    return library


def _nvidia_libraries() -> Iterator[Path]:
    """The libraries of the installed wheels that the plugin opens by name; those of a toolkit it finds by itself."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations if found else None) or ():
        for name in _RUNTIME_LIBRARIES:
            yield from sorted(Path(folder).glob(f"*/lib/{name}"))


def _require_executable(program: Path) -> None:
    if not os.access(program, os.X_OK):
        raise ConfigError(
            f"{program}, NVIDIA's assembler, cannot be executed",
            f"Run chmod +x on it, or install it anew: {install_command('cuda')} --force-reinstall.",
        )


def cuda_folder() -> Path | None:
    """A folder with ptxas and libdevice: that of the installed wheels, else of a CUDA toolkit; None without either."""
    return next((root for root in _cuda_roots() if (root / _PTXAS).is_file() and (root / _LIBDEVICE).is_file()), None)


def _cuda_roots() -> Iterator[Path]:
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations if found else None) or ():
        yield Path(folder) / "cu13"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            yield Path(value)
    if ptxas := shutil.which("ptxas"):
        yield Path(ptxas).resolve().parent.parent
    yield Path("/usr/local/cuda")
