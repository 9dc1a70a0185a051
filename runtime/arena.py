"""The arena: one private mapping with 2 MB pages that holds every weight of a model. Imports no jax.

Weights are read once per token, so the size of the pages decides the speed: a step over 4 KB pages, over a file mapping
or over shared memory takes up to twice as long as one over private huge pages.
"""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .. import CapacityError
from ..compiler.weights import ALIGNMENT
from ..compiler.xla import numpy_dtype

_log = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 << 20

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ROLLUP = Path("/proc/self/smaps_rollup")
_WORTH_SAYING_BYTES = 64 << 20


@dataclass(frozen=True)
class Slot:
    """One tensor's place: `offset` counts bytes from the arena's start and is a multiple of ALIGNMENT."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Where the next tensor may start, in bytes."""
        return -(-(self.offset + self.nbytes) // ALIGNMENT) * ALIGNMENT


Layout = Iterable[tuple[str, tuple[int, ...], str]]
"""Names, shapes and dtypes in the order of the arena."""


def place(layout: Layout) -> tuple[Slot, ...]:
    """Lays tensors out one after the other, each at the next multiple of ALIGNMENT; names must differ."""
    slots: list[Slot] = []
    offset = 0
    for name, shape, dtype in layout:
        slots.append(Slot(name, tuple(shape), numpy_dtype(dtype), offset))
        offset = slots[-1].stop
    assert len({slot.name for slot in slots}) == len(slots), "two tensors of one name"
    return tuple(slots)


class Arena:
    """Zeroed memory for the tensors of a layout; it lives as long as the arena or any view of it does."""

    def __init__(self, layout: Layout) -> None:
        """Maps the memory, which is taken when it is written. Raises CapacityError when there is no room for it."""
        self.slots = place(layout)
        self.nbytes = self.slots[-1].stop if self.slots else 0
        self.memory = _map(self.nbytes)
        self._by_name = {slot.name: slot for slot in self.slots}

    def view(self, name: str) -> np.ndarray:
        """The tensor called `name`, writable, sharing the arena's memory; KeyError if there is none."""
        slot = self._by_name[name]
        return self.memory[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).reshape(slot.shape)

    def views(self) -> dict[str, np.ndarray]:
        """All tensors by name, in the order of the layout."""
        return {slot.name: self.view(slot.name) for slot in self.slots}

    def check_huge_pages(self) -> None:
        """Says once when the filled arena got less than half its size in huge pages, as on a fragmented machine."""
        if self.nbytes < _WORTH_SAYING_BYTES:
            return
        got = _huge_bytes()
        if got is not None and got < self.nbytes / 2:
            _warn_once(f"{got >> 20} of {self.nbytes >> 20} MiB are in huge pages")


def lazy_zeros(shape: tuple[int, ...], dtype: str | np.dtype | type) -> np.ndarray:
    """Zeros at the start of a memory page, of which each takes memory once it is written. Raises CapacityError."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        mapping = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"no memory for {nbytes / 1e9:.2f} GB: {error}", "Use a machine or container with more memory."
        ) from None
    return np.frombuffer(mapping, np.uint8)[:nbytes].view(dtype).reshape(shape)


def _map(nbytes: int) -> np.ndarray:
    """Zeroed uint8 memory (nbytes,) that starts on a huge page; private, as shared memory reads at half the speed."""
    try:
        mapping = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"no memory for {nbytes / 1e9:.2f} GB of weights: {error}",
            "Use a smaller model, or a machine or container with more memory.",
        ) from None
    reason = _refusal_of_huge_pages(mapping)
    if reason:
        _warn_once(reason)
    memory = np.frombuffer(mapping, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[start : start + nbytes]


def _refusal_of_huge_pages(mapping: mmap.mmap) -> str:
    """Asks for huge pages, and says why there will be none; empty if there may be."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "this platform has none"
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        return error.strerror or str(error)
    if _HUGE_PAGES.is_file() and "[never]" in _HUGE_PAGES.read_text():
        return f"{_HUGE_PAGES} says never"
    return ""


def _huge_bytes() -> int | None:
    """The memory of this process that lies in huge pages; None where the system does not say."""
    try:
        lines = _ROLLUP.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:")), None)


@cache
def _warn_once(reason: str) -> None:
    _log.warning("huge_pages=refused reason=%r: decoding may take up to twice as long", reason)
