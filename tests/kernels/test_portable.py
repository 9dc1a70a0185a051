"""The kernels without any instruction set of their own: what other CPUs than x86-64 get."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "compiler" / "kernels"
SOURCES = [str(path) for path in sorted(KERNELS.glob("*.cpp")) if path.name != "ffi_handlers.cpp"]
PROGRAM = str(Path(__file__).with_name("kernel_test.cpp"))
COMPILER = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or ""]
CROSS = shutil.which("aarch64-linux-gnu-g++")
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread", f"-I{KERNELS}"]


def build(compiler: list[str], *flags: str) -> None:
    built = subprocess.run([*compiler, *FLAGS, *flags, PROGRAM, *SOURCES], capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="there is no C++ compiler")
def test_the_portable_kernels_pass_by_themselves(tmp_path: Path) -> None:
    program = tmp_path / "kernel_test"
    build(COMPILER, "-DMAX_KERNELS_PORTABLE", "-o", str(program))
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all kernels passed\n", "")


@pytest.mark.slow
@pytest.mark.skipif(CROSS is None, reason="there is no C++ compiler for aarch64")
def test_the_kernels_compile_for_aarch64(tmp_path: Path) -> None:
    assert CROSS is not None
    build([CROSS], "-o", str(tmp_path / "kernel_test"))
