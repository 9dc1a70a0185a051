"""The kernels elsewhere: without an instruction set of their own, for other CPUs than x86-64, with another compiler."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from .program import COMPILER, KERNELS, assert_it_passes, build

# Sanitizers, and intrinsics of some instruction sets, make the compiler warn of its own headers.
STRICT = ("-Wall", "-Wextra", "-Werror")
CROSS = shutil.which("aarch64-linux-gnu-g++")
CLANG = next(
    filter(None, map(shutil.which, ("clang++", *(f"clang++-{version}" for version in range(25, 13, -1))))), None
)
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="there is no C++ compiler")
def test_the_portable_kernels_pass_by_themselves(tmp_path: Path) -> None:
    assert_it_passes(build(tmp_path, "-DMAX_KERNELS_PORTABLE", *STRICT))


@pytest.mark.slow
@pytest.mark.skipif(CLANG is None, reason="there is no clang")
def test_clang_takes_every_instruction_set() -> None:
    """The other compiler that installs may find; it knows other names and other attributes."""
    assert CLANG is not None
    sources = [str(path) for path in KERNELS.glob("*.cpp") if not path.name.startswith("ffi_")]
    done = subprocess.run([CLANG, "-std=c++17", "-fsyntax-only", *STRICT, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def for_aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CROSS is None:
        pytest.skip("there is no C++ compiler for aarch64")
    return build(tmp_path_factory.mktemp("aarch64"), *STRICT, "-static", compiler=[CROSS])


@pytest.mark.slow
def test_the_kernels_compile_for_aarch64(for_aarch64: Path) -> None:
    elf_machine = for_aarch64.read_bytes()[18:20]
    assert elf_machine == b"\xb7\x00"


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="there is no emulator of aarch64")
def test_the_kernels_pass_on_an_emulated_aarch64(for_aarch64: Path) -> None:
    assert EMULATOR is not None
    assert_it_passes(EMULATOR, for_aarch64)


@pytest.mark.slow
def test_the_handlers_compile_for_aarch64() -> None:
    """Whose headers of XLA are not strict, and which nothing here could call."""
    if CROSS is None:
        pytest.skip("there is no C++ compiler for aarch64")
    found = find_spec("jaxlib")
    assert found is not None and found.submodule_search_locations
    headers = Path(found.submodule_search_locations[0]) / "include"
    sources = [str(path) for path in KERNELS.glob("ffi_*.cpp")]
    command = [CROSS, "-std=c++17", "-fsyntax-only", "-isystem", str(headers), *sources]
    assert len(sources) == 2 and subprocess.run(command, check=False).returncode == 0
