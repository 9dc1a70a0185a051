"""How many threads this process computes with: the kernels, XLA's own pool, and what prepares and loads models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import native

_XLA_VARIABLE = "NPROC"  # what XLA's CPU client reads when it is created

_wanted: int | None = None


def use(threads: int | None) -> None:
    """Computes with this many threads from now on, or with one per CPU of the process for None.

    All engines of a process share them. XLA's own pool keeps the number that it was created with.
    """
    global _wanted
    _wanted = threads
    library = native.library()
    if library is not None:
        library.set_num_threads(threads or 0)


def count() -> int:
    """The threads that were asked for, or else the CPUs that the process may run on."""
    if _wanted is not None:
        return _wanted
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def told_to_xla() -> Iterator[None]:
    """Lets a CPU client that is created inside make as many threads as `count` says."""
    before = os.environ.get(_XLA_VARIABLE)
    os.environ[_XLA_VARIABLE] = str(count())
    try:
        yield
    finally:
        if before is None:
            del os.environ[_XLA_VARIABLE]
        else:
            os.environ[_XLA_VARIABLE] = before
