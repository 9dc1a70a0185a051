"""The kernels without any instruction set of their own: what other CPUs than x86-64 get."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .program import COMPILER, assert_it_passes, build

# Sanitizers, and intrinsics of some instruction sets, make the compiler warn of its own headers.
STRICT = ("-Wall", "-Wextra", "-Werror")
CROSS = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="there is no C++ compiler")
def test_the_portable_kernels_pass_by_themselves(tmp_path: Path) -> None:
    assert_it_passes(build(tmp_path, "-DMAX_KERNELS_PORTABLE", *STRICT))


@pytest.mark.slow
@pytest.mark.skipif(CROSS is None, reason="there is no C++ compiler for aarch64")
def test_the_kernels_compile_for_aarch64(tmp_path: Path) -> None:
    assert CROSS is not None
    build(tmp_path, *STRICT, compiler=[CROSS])
