"""The kernels and their thread pool under sanitizers, in a C++ program without Python and XLA."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "compiler" / "kernels"
COMPILER = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or ""]
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("sanitizer", "arguments"), [("address,undefined", []), ("thread", ["without-fork"])], ids=["address", "thread"]
)
def test_the_kernels_pass_under(sanitizer: str, arguments: list[str], tmp_path: Path) -> None:
    sources = [path for path in sorted(KERNELS.glob("*.cpp")) if path.name != "ffi_handlers.cpp"]
    program = tmp_path / "kernel_test"
    flags = [*FLAGS, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-I", str(KERNELS)]
    command = [
        *COMPILER,
        *flags,
        "-o",
        str(program),
        str(Path(__file__).with_name("kernel_test.cpp")),
        *map(str, sources),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all kernels passed\n", "")
