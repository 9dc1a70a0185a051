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
from ..compiler import native
from .arena import Arena, Layout, Slot, place
from .checkpoint import encoding_of
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
from .tensor_stream import row_bytes

if TYPE_CHECKING:
    from ..compiler.weights import Packing, Weight, WeightTable
    from .checkpoint import Checkpoint

Progress = Callable[[int, int], None]
"""Takes the bytes done and the bytes there are; called in the thread that asked for the work."""

_GROUP_BYTES = 32 << 20
_JOB_BYTES = 8 << 20
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
    reads = [read for weight in table.weights for read in _reads(checkpoint, weight, arena.view(weight.name))]
    done, total = 0, sum(read.nbytes for read in reads)
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
            arena = arena or Arena((slot.name, slot.shape, slot.dtype) for slot in contents.slots)
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
class _Read:
    """Rows of one checkpoint tensor and where they go: the unit of work that threads share when they convert."""

    checkpoint: Checkpoint
    tensor: str
    target: np.ndarray
    transposed: bool
    rows: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.target.nbytes

    def run(self) -> int:
        self.checkpoint.read_into(self.tensor, self.target, self.transposed, self.rows)
        return self.nbytes


def _reads(checkpoint: Checkpoint, weight: Weight, view: np.ndarray) -> Iterator[_Read | _Packing]:
    """The reads that fill a weight: its sources side by side along the last axis, each in parts of about 8 MiB."""
    if weight.packed:
        yield from _packings(checkpoint, weight, view)
        return
    start = 0
    for source, shape in weight.source_shapes():
        width = shape[0] if weight.transposed else shape[-1]
        share = view[..., start : start + width]
        start += width
        step = max(64, _JOB_BYTES * shape[0] // max(share.nbytes, 1) // 64 * 64)
        for first in range(0, shape[0], step):
            rows = first, min(first + step, shape[0])
            target = share[..., slice(*rows)] if weight.transposed else share[slice(*rows)]
            yield _Read(checkpoint, source, target, weight.transposed, rows)


@dataclass(frozen=True)
class _Packing:
    """Rows of one checkpoint tensor, its outputs, on their way into the panels of a packed matrix."""

    checkpoint: Checkpoint
    weight: Weight
    tensor: str
    target: np.ndarray
    columns: native.Columns
    first_column: int
    rows: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Of the source as float32."""
        return 4 * (self.rows[1] - self.rows[0]) * self.weight.shape[0]

    def run(self) -> int:
        library, outputs = native.library(), self.weight.shape[1]
        assert library is not None and self.weight.packed, "weights are packed by the kernels that read them"
        library.pack(
            self._source(self.weight.packed),
            self.target,
            self.weight.packed,
            columns=self.columns,
            first_column=self.first_column + self.rows[0],
            total_columns=outputs // 2 if self.weight.gated else outputs,
        )
        return self.nbytes

    def _source(self, packing: Packing) -> np.ndarray:
        """The rows as blocks where they are quantized in this encoding already, else as float32 (inputs, outputs)."""
        count = self.rows[1] - self.rows[0]
        if packing in native.BLOCKS and encoding_of(self.checkpoint.tensors[self.tensor]) == packing:
            blocks = np.empty((count, row_bytes(self.checkpoint.tensors[self.tensor])), np.uint8)
            self.checkpoint.read_stored_into(self.tensor, blocks, self.rows)
            return blocks
        values = np.empty((count, self.weight.shape[0]), np.float32)
        self.checkpoint.read_into(self.tensor, values, False, self.rows)
        return values.T


def _packings(checkpoint: Checkpoint, weight: Weight, view: np.ndarray) -> Iterator[_Packing]:
    """The parts of a packed matrix, each of about 8 MiB of float32; the padding of its panels is zeroed first."""
    view[...] = 0
    first = 0
    for index, (source, (outputs, inputs)) in enumerate(weight.source_shapes()):
        columns: native.Columns = ("gate", "up")[index] if weight.gated else "plain"
        step = max(64, _JOB_BYTES // (4 * inputs) // 64 * 64)
        for start in range(0, outputs, step):
            rows = start, min(start + step, outputs)
            yield _Packing(checkpoint, weight, source, view, columns, first, rows)
        if not weight.gated:
            first += outputs


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

    def write_chunk(chunk: tuple[int, np.ndarray]) -> int:
        offset, memory = chunk
        write_at(descriptor, memory.data, HEADER_BYTES + offset)
        return xxhash.xxh3_64_intdigest(memory.data)

    with ThreadPoolExecutor(threads, "prepare") as pool:
        for offset, memory in _regions(pool, checkpoint, table, slots, arena):
            parts = [(offset + at, memory[at : at + CHUNK_BYTES]) for at in range(0, len(memory), CHUNK_BYTES)]
            for (at, part), digest in zip(parts, _in_order(pool, write_chunk, parts), strict=True):
                chunks.append(digest)
                if on_progress:
                    on_progress(at + len(part), total)
    return write_contents(descriptor, slots, chunks)


def _regions(
    pool: ThreadPoolExecutor,
    checkpoint: Checkpoint,
    table: WeightTable,
    slots: Sequence[Slot],
    arena: Arena | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """The data piece by piece, filled, with the offset of each: whole chunks, except at the end.

    A piece is a part of the arena, or memory that the next piece takes over.
    """
    groups = list(_groups(list(zip(table.weights, slots, strict=True))))
    largest = max((group[-1][1].stop - group[0][1].offset for group in groups), default=0)
    staging = arena or Arena([("staging", (largest + CHUNK_BYTES,), "uint8")])
    start = 0  # of `memory` in the data
    for group in groups:
        stop = group[-1][1].stop
        memory = staging.memory[start:stop] if staging is arena else staging.memory[: stop - start]
        reads = []
        for weight, slot in group:
            at = slot.offset - start
            memory[at + slot.nbytes : slot.stop - start] = 0
            view = memory[at : at + slot.nbytes].view(slot.dtype).reshape(slot.shape)
            reads += _reads(checkpoint, weight, view)
        for _ in _in_order(pool, lambda read: read.run(), reads):
            pass
        whole = len(memory) if group is groups[-1] else len(memory) // CHUNK_BYTES * CHUNK_BYTES
        yield start, memory[:whole]
        if staging is not arena:
            staging.memory[: len(memory) - whole] = memory[whole:]
        start += whole


def _groups(weights: list[tuple[Weight, Slot]]) -> Iterator[list[tuple[Weight, Slot]]]:
    """Neighbours that are prepared together: up to 32 MiB, or one larger weight."""
    group: list[tuple[Weight, Slot]] = []
    for weight, slot in weights:
        if group and slot.stop - group[0][1].offset > _GROUP_BYTES:
            yield group
            group = []
        group.append((weight, slot))
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
