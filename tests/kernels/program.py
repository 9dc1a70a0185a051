"""Builds the C++ program that tests the kernels without Python and XLA."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "compiler" / "kernels"
COMPILER = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or ""]
_SOURCES = [path for path in sorted(KERNELS.glob("*.cpp")) if not path.name.startswith("ffi_")]
_SOURCES.sort(key=lambda path: not path.name.startswith("isa_"))  # those that take longest, so that no core waits
_FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-pthread", f"-I{KERNELS}"]


def build(folder: Path, *flags: str, compiler: list[str] = COMPILER) -> Path:
    """Compiles one file on each core and links the program."""

    def run(*arguments: str) -> None:
        done = subprocess.run([*compiler, *_FLAGS, *flags, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        run("-c", str(source), "-o", made)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*_SOURCES, Path(__file__).with_name("kernel_test.cpp")]))
    program = folder / "kernel_test"
    run(*objects, "-o", str(program))
    return program


def assert_it_passes(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all kernels passed\n", "")
