"""The threads of a process: those that were asked for, in the kernels and in XLA, and idle ones that cost nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from max.compiler import threads
from max.compiler.config import CompileConfig
from max.compiler.native import library


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    threads.use(None)


def test_as_many_as_asked_for_or_as_there_are_cpus(as_before: None) -> None:
    cpus = len(os.sched_getaffinity(0))
    assert threads.count() == cpus
    threads.use(3)
    assert threads.count() == 3
    kernels = library()
    assert kernels is None or kernels.num_threads == 3
    threads.use(None)
    assert threads.count() == cpus
    assert kernels is None or kernels.num_threads == cpus


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="num_threads"):
        CompileConfig(num_threads=0)


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("wanted", [1, 5])
def test_xla_makes_as_many_threads(wanted: int) -> None:
    """Its pool shows in the names of the process's threads."""
    names = in_a_process(
        f"""
from pathlib import Path
from max.compiler import threads, xla
threads.use({wanted})
xla.start_client()
print(sum("XLAEigen" in path.read_text() for path in Path("/proc/self/task").glob("*/comm")))
"""
    )
    assert int(names) == wanted


@pytest.mark.skipif(library() is None, reason="the package was installed without a C++ compiler")
def test_an_idle_pool_costs_no_time() -> None:
    """The CPU time of all threads, in the second half of a second after a loop."""
    seconds = in_a_process(
        """
import time
import numpy as np
from max.compiler.native import library
kernels = library()
kernels.set_num_threads(4)
kernels.argmax(np.zeros((64, 5000), np.float32))
time.sleep(0.25)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
    )
    assert float(seconds) < 0.05, "one spinning thread would take 0.5 s"
