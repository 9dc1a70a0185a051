"""The installed library on CPUs that this one is not: which instruction set it takes, and that it keeps to it.

A forced instruction set shows what the kernels compute. That nothing else of the library is beyond an old CPU shows
only there: a function of a larger set, linked in the place of one of the same name, is an illegal instruction.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest

from max.compiler.native import ISA_VARIABLE, library
from max.compiler.native_functions import Encoding

EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
_MULTIPLY = """
import sys
import numpy as np
from typing import get_args
from max.compiler.native import library
from max.compiler.native_functions import Encoding

kernels = library()
x, w = np.load(sys.argv[1]), np.load(sys.argv[2])
found = []
for encoding in get_args(Encoding):
    packed = np.zeros(kernels.packed_bytes(encoding, *w.shape), np.uint8)
    kernels.pack(w, packed, encoding)
    found.append(np.full((len(x), w.shape[1]), np.nan, np.float32))
    kernels.matmul(x, packed, found[-1], encoding)
np.save(sys.argv[3], found)
print(kernels.isa)
"""


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="there is no emulator of x86-64")
@pytest.mark.skipif(library() is None, reason="the kernels were not built: no C++ compiler")
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "baseline"), ("IvyBridge", "baseline"), ("Haswell", "avx2")])
def test_an_older_cpu_gets_what_it_has(tmp_path, cpu: str, isa: str) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in ((5, 256), (256, 40)))
    given, result = [str(tmp_path / name) for name in ("x.npy", "w.npy")], str(tmp_path / "y.npy")
    for path, array in zip(given, (x, w), strict=True):
        np.save(path, array)
    assert EMULATOR is not None
    command = [EMULATOR, "-cpu", cpu, sys.executable, "-c", _MULTIPLY, *given, result]
    environ = {name: value for name, value in os.environ.items() if name != ISA_VARIABLE}
    done = subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{isa}\n"), done.stderr
    exact = x.astype(np.float64) @ w
    for encoding, y in zip(get_args(Encoding), np.load(result), strict=True):
        share = np.sqrt(np.mean((y - exact) ** 2)) / exact.std()
        assert share < {"float32": 1e-6, "bfloat16": 0.01, "q8_0": 0.02, "q6_k": 0.05}.get(encoding, 0.2), encoding
