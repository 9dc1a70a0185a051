"""Stand-ins for ROCm libraries: ELF files that the dynamic loader takes, with the functions that were asked for."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from max import CompileError
from max.compiler.targets import rocm_stubs

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="AMD's plugin is for x86-64 hosts")

FUNCTIONS = [
    "__hipRegisterFatBinary",
    "__hipRegisterFunction",
    "hipGetErrorString",
    "hipMalloc",
    "rocblas_create_handle",
]


def test_the_loader_takes_a_library_and_its_functions_answer(tmp_path: Path) -> None:
    path = tmp_path / "libstand-in.so.7"
    path.write_bytes(rocm_stubs._shared_library(path.name, FUNCTIONS))
    library = ctypes.CDLL(str(path))
    assert library.hipMalloc(0, 0) == library.rocblas_create_handle(0) == 100
    assert library.__getattr__("__hipRegisterFunction")() == 0
    library.hipGetErrorString.restype = ctypes.c_char_p
    assert library.hipGetErrorString(1) == b"stub"
    memory = library.__getattr__("__hipRegisterFatBinary")
    memory.restype = ctypes.POINTER(ctypes.c_long)
    memory()[1] = 5  # it is written through
    assert memory()[1] == 5
    with pytest.raises(AttributeError):
        library.hipFree  # noqa: B018


@pytest.mark.parametrize("functions", [[], ["hipInit"]])
def test_small_libraries(functions: list[str], tmp_path: Path) -> None:
    path = tmp_path / "libsmall.so"
    path.write_bytes(rocm_stubs._shared_library(path.name, functions))
    library = ctypes.CDLL(str(path))
    assert [library[name]() for name in functions] == [100] * len(functions)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_binutils_agrees(tmp_path: Path) -> None:
    path = tmp_path / "libhip.so.7"
    path.write_bytes(rocm_stubs._shared_library(path.name, FUNCTIONS))
    shown = subprocess.run(["readelf", "-Wd", str(path)], capture_output=True, text=True, check=True).stdout
    assert "Library soname: [libhip.so.7]" in shown


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_libraries_and_functions_of_a_plugin_are_found_and_stood_in_for(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    for name, text in (
        ("amdstub_hip64", "int hipInit(void){return 1;}"),
        ("rocstubblas", ""),
        ("other", "int one(void){return 1;}"),
    ):
        (real / "part.c").write_text(text)
        library = f"lib{name}.so.1"
        build(real / "part.c", real / library, f"-Wl,-soname,{library}")
        (real / f"lib{name}.so").symlink_to(library)
    source = tmp_path / "plugin.c"
    source.write_text("int hipInit(void); int one(void); int answer(void){return hipInit() + one();}")
    plugin = tmp_path / "plugin.so"
    build(
        source,
        plugin,
        "-Wl,--no-as-needed",
        f"-L{real}",
        "-lamdstub_hip64",
        "-lrocstubblas",
        "-lother",
        f"-Wl,-rpath,{tmp_path}",
    )
    shutil.copy(real / "libother.so.1", tmp_path / "libother.so.1")
    needed, undefined = rocm_stubs._links(plugin)
    assert {"libamdstub_hip64.so.1", "librocstubblas.so.1", "libother.so.1"} <= set(needed)
    assert {"hipInit", "one"} <= undefined
    folder = tmp_path / "stand-ins"
    folder.mkdir()
    assert rocm_stubs.load(plugin, folder) == ["libamdstub_hip64.so.1", "librocstubblas.so.1"]
    assert ctypes.CDLL(str(plugin)).answer() == 100 + 1


def build(source: Path, to: Path, *options: str) -> None:
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(to), *options], check=True)


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plugin.so").write_bytes(b"#!/bin/sh\n" + bytes(100))
    with pytest.raises(CompileError, match="is no x86-64 shared library"):
        rocm_stubs.load(tmp_path / "plugin.so", tmp_path)
