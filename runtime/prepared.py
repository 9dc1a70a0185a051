"""Prepared weights: a checkpoint converted once into the bytes of an arena, then read back in one sweep at each start.

Neither direction imports jax or an architecture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from .. import CacheError
from ..cache.folder import retrying
from .arena import Arena, Layout, Slot, place
from .prepared_format import (
    CHUNK_BYTES,
    HEADER_BYTES,
    Contents,
    damaged,
    data_bytes,
    read_contents,
    write_at,
    write_contents,
)
from .weight_reads import reads_of

if TYPE_CHECKING:
    from ..compiler.weights import Weight, WeightTable
    from .checkpoint import Checkpoint

Progress = Callable[[int, int], None]
"""Takes the bytes done and the bytes there are; called in the thread that asked for the work."""

_GROUP_BYTES = 32 << 20
_KEPT_SHARE = 0.25  # of the machine's memory: a larger file leaves the page cache again, to leave room for the arena


def layout_of(table: WeightTable) -> Layout:
    """The arena's layout for the weights of a pipeline, in their order."""
    return [(weight.name, weight.stored_shape, weight.dtype) for weight in table.weights]


def prepare(
    table: WeightTable,
    checkpoint: Checkpoint,
    path: Path,
    *,
    threads: int,
    arena: Arena | None = None,
    on_progress: Progress | None = None,
) -> str:
    """Converts a checkpoint into a file of prepared weights at `path`, whole or not at all, and returns its id.

    arena: of the table's layout; filled on the way if given, so that a first start need not read the file back.
           Without one, memory for the largest weight or 32 MiB is taken, and some MiB for each thread.
    Raises WeightError when the checkpoint does not fit or cannot be read, CacheError when `path` cannot be written.
    """
    checkpoint.check(table)
    part = None
    try:
        descriptor, part = mkstemp(".part", f"{path.name}.", path.parent)
        try:
            identity = _write(table, checkpoint, descriptor, threads, arena, on_progress)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, path)
        part = None
    except OSError as error:
        raise CacheError(
            f"prepared weights cannot be written to {path}: {error.strerror}",
            "Free some space there or choose another cache folder; the weights can be used without it.",
        ) from None
    finally:
        if part:
            os.unlink(part)
    return identity


def prepare_into(
    table: WeightTable, checkpoint: Checkpoint, arena: Arena, *, threads: int, on_progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Fills an arena of the table's layout from a checkpoint, without a file; raises WeightError."""
    checkpoint.check(table)
    assert arena.slots == place(layout_of(table)), "an arena of another layout"
    pieces = _pieces(table, arena.slots)
    reads = [read for piece in pieces for read in reads_of(checkpoint, piece.weight, piece.view(arena.memory, 0))]
    done, total = 0, sum(read.nbytes for read in reads)
    if on_progress:
        on_progress(done, total)
    with ThreadPoolExecutor(threads, "prepare") as pool:
        for nbytes in _in_order(pool, lambda read: read.run(), reads):
            done += nbytes
            if on_progress:
                on_progress(done, total)
    return arena.views()


def load(
    path: Path,
    arena: Arena | None = None,
    *,
    threads: int,
    expected_id: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Reads a file of prepared weights into an arena, checks every chunk and returns the tensors by name.

    arena: of the file's layout; a new one if None
    Raises CacheError when the file is not there, damaged, truncated, packed for another purpose, of another layout
    than the arena, or does not have the id `expected_id`; CapacityError when there is no memory for a new arena.
    """
    try:
        descriptor = retrying(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            contents = read_contents(descriptor, path)
            if expected_id is not None and contents.id != expected_id:
                raise damaged(path, f"its id is {contents.id[:12]}, {expected_id[:12]} is needed")
            arena = arena or Arena((slot.name, slot.shape, slot.dtype.name) for slot in contents.slots)
            if arena.slots != contents.slots:
                raise damaged(path, "its tensors are not those of this model")
            _read(descriptor, path, contents, arena.memory, threads, on_progress)
            arena.check_huge_pages()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None
    return arena.views()


@dataclass(frozen=True)
class _Piece:
    """A weight and its place in the data."""

    weight: Weight
    slot: Slot

    def view(self, memory: np.ndarray, start: int) -> np.ndarray:
        """The weight in memory that holds the data from `start` on."""
        at = self.slot.offset - start
        return memory[at : at + self.slot.nbytes].view(self.slot.dtype).reshape(self.weight.stored_shape)


def _pieces(table: WeightTable, slots: Sequence[Slot]) -> Iterator[_Piece]:
    """The weights in order."""
    return (_Piece(weight, slot) for weight, slot in zip(table.weights, slots, strict=True))


def _write(
    table: WeightTable,
    checkpoint: Checkpoint,
    descriptor: int,
    threads: int,
    arena: Arena | None,
    on_progress: Progress | None,
) -> str:
    """Converts group after group of weights, and hashes and writes the chunks that each one completes."""
    slots = place(layout_of(table))
    assert arena is None or arena.slots == slots, "an arena of another layout"
    total = data_bytes(slots)
    chunks: list[int] = []

    def on_filled(done: int) -> None:
        if on_progress:
            on_progress(done, total)

    def write_chunk(chunk: tuple[int, np.ndarray]) -> int:
        offset, memory = chunk
        write_at(descriptor, memory.data, HEADER_BYTES + offset)
        return xxhash.xxh3_64_intdigest(memory.data)

    with ThreadPoolExecutor(threads, "prepare") as pool:
        on_filled(0)
        for offset, memory in _regions(pool, checkpoint, table, slots, arena, on_filled):
            parts = [(offset + at, memory[at : at + CHUNK_BYTES]) for at in range(0, len(memory), CHUNK_BYTES)]
            chunks += _in_order(pool, write_chunk, parts)
    return write_contents(descriptor, slots, chunks)


def _regions(
    pool: ThreadPoolExecutor,
    checkpoint: Checkpoint,
    table: WeightTable,
    slots: Sequence[Slot],
    arena: Arena | None,
    on_filled: Callable[[int], None],
) -> Iterator[tuple[int, np.ndarray]]:
    """The data piece by piece, filled, with the offset of each: whole chunks, except at the end.

    A piece is a part of the arena, or memory that the next piece takes over.
    on_filled: takes the bytes of the data that are filled, as often as a part of a weight is
    """
    groups = list(_groups(_pieces(table, slots)))
    largest = max((group[-1].slot.stop - group[0].slot.offset for group in groups), default=0)
    staging = arena or Arena([("staging", (largest + CHUNK_BYTES,), "uint8")])
    start = 0  # of `memory` in the data
    for group in groups:
        stop = group[-1].slot.stop
        memory = staging.memory[start:stop] if staging is arena else staging.memory[: stop - start]
        reads = []
        for piece in group:
            memory[piece.slot.offset + piece.slot.nbytes - start : piece.slot.stop - start] = 0
            reads += reads_of(checkpoint, piece.weight, piece.view(memory, start))
        begin, size = group[0].slot.offset, stop - group[0].slot.offset
        for count, _ in enumerate(_in_order(pool, lambda read: read.run(), reads), 1):
            on_filled(begin + size * count // len(reads))
        whole = len(memory) if group is groups[-1] else len(memory) // CHUNK_BYTES * CHUNK_BYTES
        yield start, memory[:whole]
        if staging is not arena:
            staging.memory[: len(memory) - whole] = memory[whole:]
        start += whole


def _groups(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Neighbours that are prepared together: up to 32 MiB, or one larger weight."""
    group: list[_Piece] = []
    for piece in pieces:
        if group and piece.slot.stop - group[0].slot.offset > _GROUP_BYTES:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _read(
    descriptor: int, path: Path, contents: Contents, memory: np.ndarray, threads: int, on_progress: Progress | None
) -> None:
    """Reads the data into `memory` and checks each chunk."""
    total = contents.data_bytes
    drop = HEADER_BYTES + total > _KEPT_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def read_chunk(chunk: tuple[int, int]) -> int:
        offset, digest = chunk
        part = memory[offset : offset + CHUNK_BYTES].data
        _read_exactly(descriptor, path, part, HEADER_BYTES + offset)
        if xxhash.xxh3_64_intdigest(part) != digest:
            raise damaged(path, f"the chunk at byte {HEADER_BYTES + offset} is damaged")
        if drop:
            os.posix_fadvise(descriptor, HEADER_BYTES + offset, len(part), os.POSIX_FADV_DONTNEED)
        return offset + len(part)

    with ThreadPoolExecutor(threads, "load") as pool:
        chunks = list(zip(range(0, total, CHUNK_BYTES), contents.chunks, strict=True))
        for done in _in_order(pool, read_chunk, chunks):
            if on_progress:
                on_progress(done, total)


def _read_exactly(descriptor: int, path: Path, buffer: memoryview, offset: int) -> None:
    while buffer:
        got = retrying(os.preadv, descriptor, [buffer], offset)
        if not got:
            raise damaged(path, f"it ends at byte {offset}")
        buffer, offset = buffer[got:], offset + got


def _in_order[T, R](pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results in the order of the items; an error, or an early end, cancels what has not begun."""
    futures = [pool.submit(work, item) for item in items]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
