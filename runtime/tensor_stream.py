"""Reads one checkpoint tensor into a float32 array: in blocks of rows, converted and transposed on the way.

Imports no jax.
"""

from __future__ import annotations

import math
import os

import numpy as np

from .. import WeightError
from .safetensors_file import TensorInfo

BLOCK_BYTES = 4 << 20

# A transposition goes through a panel of this many source rows and columns, which stays in the L2 cache. The padding
# keeps one column of the panel out of a single cache set: 8 GB/s with it, 2 GB/s without (Zen 4, one core).
_PANEL_ROWS, _PANEL_COLUMNS, _PADDING = 64, 2048, 16

_STORED = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
FLOAT_DTYPES = tuple(_STORED)


def read_tensor(
    tensor: TensorInfo, out: np.ndarray, *, transposed: bool = False, rows: tuple[int, int] | None = None
) -> None:
    """Fills `out` with the rows [first, last) of a float tensor, all of them if `rows` is None, as float32.

    out: float32 and little-endian; (rows, ...) as stored, or (columns, rows) of a matrix if `transposed`. Up to two
         axes it may have any strides, and must be contiguous with more.
    Takes about 5 MiB beside `out` (or a row, if that is longer). Threads may call it at once.
    Raises WeightError when the file cannot be read or has become shorter.
    """
    shape = tensor.shape or (1,)
    first, last = rows or (0, shape[0])
    columns = math.prod(shape[1:])
    target = out.T if transposed else out.reshape(last - first, columns)
    assert out.dtype == np.float32 and target.shape == (last - first, columns)
    if not target.size:
        return
    assert np.may_share_memory(target, out), "this layout needs contiguous memory"
    try:
        descriptor = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _read_rows(descriptor, tensor, first, target)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise WeightError(f"{tensor.file} cannot be read: {error.strerror}", "Check the disk and the path.") from None


def _read_rows(descriptor: int, tensor: TensorInfo, first: int, target: np.ndarray) -> None:
    stored = _STORED[tensor.dtype]
    count, columns = target.shape
    row_bytes = columns * stored.itemsize
    if stored == target.dtype and target.flags.c_contiguous:
        _read_exactly(descriptor, tensor, tensor.offset + first * row_bytes, target)
        return
    block_rows = max(1, BLOCK_BYTES // row_bytes)
    if block_rows > _PANEL_ROWS:
        block_rows -= block_rows % _PANEL_ROWS
    scratch = np.empty((min(block_rows, count), columns), stored)
    for start in range(0, count, block_rows):
        block = scratch[: min(block_rows, count - start)]
        _read_exactly(descriptor, tensor, tensor.offset + (first + start) * row_bytes, block)
        part = target[start : start + len(block)]
        if part.flags.c_contiguous or part.strides[0] > part.strides[1]:
            _convert(block, part)
        else:
            _transpose(block, part.T)


def _read_exactly(descriptor: int, tensor: TensorInfo, offset: int, out: np.ndarray) -> None:
    buffer = memoryview(out).cast("B")
    while buffer:
        got = os.preadv(descriptor, [buffer], offset)
        if not got:
            raise WeightError(
                f"{tensor.file} ends before byte {offset + len(buffer)}",
                "It became shorter while it was read: do not change a checkpoint in use.",
            )
        buffer, offset = buffer[got:], offset + got


def _convert(block: np.ndarray, out: np.ndarray) -> None:
    """Writes a block as stored to float32 `out` of the same shape; bfloat16 comes as uint16, a float32's upper half."""
    if block.dtype == np.uint16:
        np.left_shift(block, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
        return
    with np.errstate(over="ignore"):  # a float64 beyond float32 is an infinity
        np.copyto(out, block, casting="same_kind")


def _transpose(block: np.ndarray, out: np.ndarray) -> None:
    """Writes block.T to float32 `out`, (columns, rows)."""
    rows, columns = block.shape
    buffer = np.empty((_PANEL_ROWS, _PANEL_COLUMNS + _PADDING), np.float32)
    for row in range(0, rows, _PANEL_ROWS):
        for column in range(0, columns, _PANEL_COLUMNS):
            part = block[row : row + _PANEL_ROWS, column : column + _PANEL_COLUMNS]
            panel = buffer[: part.shape[0], : part.shape[1]]
            _convert(part, panel)
            np.copyto(out[column : column + part.shape[1], row : row + part.shape[0]], panel.T)
