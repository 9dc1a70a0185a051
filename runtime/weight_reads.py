"""The reads that fill a weight from a checkpoint's tensors, each small enough to be shared out among threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..compiler import native
from ..compiler.native_packing import BLOCKS, Columns
from .checkpoint import encoding_of
from .tensor_stream import row_bytes

if TYPE_CHECKING:
    from ..compiler.panels import Packing
    from ..compiler.weights import Weight
    from .checkpoint import Checkpoint

_JOB_BYTES = 8 << 20


type Read = TensorRead | PackedRead


@dataclass(frozen=True)
class TensorRead:
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


def reads_of(checkpoint: Checkpoint, weight: Weight, view: np.ndarray) -> Iterator[Read]:
    """The reads that fill a weight: each source in its place, in parts of about 8 MiB."""
    if weight.packed:
        yield from _packed_reads(checkpoint, weight, view)
        return
    for source, shape, share_of in weight.places():
        share = view[share_of]
        step = max(64, _JOB_BYTES * shape[0] // max(share.nbytes, 1) // 64 * 64)
        for first in range(0, shape[0], step):
            rows = first, min(first + step, shape[0])
            target = share[..., slice(*rows)] if weight.transposed else share[slice(*rows)]
            yield TensorRead(checkpoint, source, target, weight.transposed, rows)


@dataclass(frozen=True)
class PackedRead:
    """Rows of one checkpoint tensor, its outputs, on their way into the panels of a packed matrix."""

    checkpoint: Checkpoint
    weight: Weight
    tensor: str
    target: np.ndarray
    columns: Columns
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
        if packing in BLOCKS and encoding_of(self.checkpoint.tensors[self.tensor]) == packing:
            blocks = np.empty((count, row_bytes(self.checkpoint.tensors[self.tensor])), np.uint8)
            self.checkpoint.read_stored_into(self.tensor, blocks, self.rows)
            return blocks
        values = np.empty((count, self.weight.shape[0]), np.float32)
        self.checkpoint.read_into(self.tensor, values, False, self.rows)
        return values.T


def _packed_reads(checkpoint: Checkpoint, weight: Weight, view: np.ndarray) -> Iterator[PackedRead]:
    """The parts of a packed matrix, each of about 8 MiB of float32; the padding of its panels is zeroed first."""
    view[...] = 0
    first = 0
    for index, (source, (outputs, inputs)) in enumerate(weight.source_shapes()):
        columns: Columns = ("gate", "up")[index] if weight.gated else "plain"
        step = max(64, _JOB_BYTES // (4 * inputs) // 64 * 64)
        for start in range(0, outputs, step):
            rows = start, min(start + step, outputs)
            yield PackedRead(checkpoint, weight, source, view, columns, first, rows)
        if not weight.gated:
            first += outputs
