"""Reads one checkpoint tensor into memory: in blocks of rows, converted and transposed on the way, or as it is stored.

Imports no jax.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from .. import WeightError
from .gguf_file import BLOCKS
from .safetensors_file import TensorInfo

BLOCK_BYTES = 4 << 20
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_QUANTIZED_BYTES = 1 << 20  # some 8 MiB once it is float32

# A transposition goes through a panel of this many source rows and columns, which stays in the L2 cache. The padding
# keeps one column of the panel out of a single cache set: 8 GB/s with it, 2 GB/s without (Zen 4, one core).
_PANEL_ROWS, _PANEL_COLUMNS, _PADDING = 64, 2048, 16

_STORED = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
QUANTIZED = tuple(name for name in BLOCKS if name not in _STORED)
READABLE = (*_STORED, *QUANTIZED)


def read_tensor(
    tensor: TensorInfo, out: np.ndarray, *, transposed: bool = False, rows: tuple[int, int] | None = None
) -> None:
    """Fills `out` with the rows [first, last) of a tensor, all of them if `rows` is None, converted to its dtype.

    out: float32, or bfloat16, to which values are rounded; little-endian; (rows, ...) as stored, or (columns, rows) of
         a matrix if `transposed`. Up to two axes it may have any strides, and must be contiguous with more.
    Takes about 5 MiB beside `out` (or a row, if that is longer), 20 MiB for a quantized tensor. Threads may call it at
    once. Raises WeightError when the file cannot be read or has become shorter.
    """
    shape = tensor.shape or (1,)
    first, last = rows or (0, shape[0])
    columns = math.prod(shape[1:])
    target = out.T if transposed else out.reshape(last - first, columns)
    assert out.dtype in (np.float32, _BFLOAT16) and target.shape == (last - first, columns)
    if not target.size:
        return
    assert np.may_share_memory(target, out), "this layout needs contiguous memory"
    with _Rows(tensor, columns) as stored:
        if _holds(tensor, out.dtype) and not tensor.interleaved and target.flags.c_contiguous:
            stored.read(first, target)
            return
        for start, block in stored.blocks(first, last):
            values = _dequantized(block, tensor.dtype) if tensor.dtype in QUANTIZED else block
            part = target[start - first : start - first + len(values)]
            if part.flags.c_contiguous or part.strides[0] > part.strides[1]:
                _convert(values, part)
            else:
                _transpose(values, part.T)


def read_stored(tensor: TensorInfo, out: np.ndarray, rows: tuple[int, int]) -> None:
    """Fills `out` with the rows [first, last) of a quantized matrix, each as its blocks.

    out: (rows, `row_bytes`) uint8, contiguous. Raises WeightError as `read_tensor` does.
    """
    first, last = rows
    assert out.shape == (last - first, row_bytes(tensor)) and out.dtype == np.uint8
    with _Rows(tensor, math.prod(tensor.shape[1:])) as stored:
        for start, block in stored.blocks(first, last):
            out[start - first : start - first + len(block)] = block


def row_bytes(tensor: TensorInfo) -> int:
    """The bytes of a row as it is stored."""
    return tensor.nbytes // max(tensor.shape[0], 1)


class _Rows:
    """The rows of an open tensor, in the order of the Hugging Face form."""

    def __init__(self, tensor: TensorInfo, columns: int) -> None:
        self._tensor = tensor
        self._quantized = tensor.dtype in QUANTIZED
        self._dtype = np.dtype(np.uint8) if self._quantized else _STORED[tensor.dtype]
        self._width = row_bytes(tensor) if self._quantized else columns

    def __enter__(self) -> _Rows:
        try:
            self._descriptor = os.open(self._tensor.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def blocks(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows [first, last) piece by piece with the row that each begins at, in memory that the next one reuses."""
        if self._tensor.interleaved:
            yield from self._heads(first, last)
            return
        bytes_at_once = _QUANTIZED_BYTES if self._quantized else BLOCK_BYTES
        rows = max(1, bytes_at_once // (self._width * self._dtype.itemsize))
        if rows > _PANEL_ROWS:
            rows -= rows % _PANEL_ROWS
        scratch = np.empty((min(rows, last - first), self._width), self._dtype)
        for start in range(first, last, rows):
            block = scratch[: min(rows, last - start)]
            self.read(start, block)
            yield start, block

    def _heads(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """As `blocks`, head by head: the even rows of one are its first half, the odd ones its second."""
        size = self._tensor.shape[0] // self._tensor.interleaved
        scratch = np.empty((size, self._width), self._dtype)
        for head in range(first // size * size, last, size):
            self.read(head, scratch)
            ordered = np.concatenate([scratch[0::2], scratch[1::2]])
            begin, end = max(first, head), min(last, head + size)
            yield begin, ordered[begin - head : end - head]

    def read(self, row: int, out: np.ndarray) -> None:
        """Fills contiguous `out` with rows as they lie in the file, from `row` on."""
        offset = self._tensor.offset + row * self._width * self._dtype.itemsize
        buffer = out.reshape(-1).view(np.uint8).data
        try:
            while buffer:
                got = os.preadv(self._descriptor, [buffer], offset)
                if not got:
                    raise WeightError(
                        f"{self._tensor.file} ends before byte {offset + len(buffer)}",
                        "It became shorter while it was read: do not change a checkpoint in use.",
                    )
                buffer, offset = buffer[got:], offset + got
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> WeightError:
        return WeightError(f"{self._tensor.file} cannot be read: {error.strerror}", "Check the disk and the path.")


def _dequantized(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Rows of blocks as float32; the package is loaded only where values are needed."""
    import gguf

    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def _holds(tensor: TensorInfo, dtype: np.dtype) -> bool:
    """Whether a tensor's bytes in its file are those of its values in this dtype."""
    return tensor.dtype == {2: "BF16", 4: "F32"}[dtype.itemsize]


def _convert(block: np.ndarray, out: np.ndarray) -> None:
    """Writes a block as stored to `out` of the same shape; bfloat16 comes as uint16, a float32's upper half."""
    if out.dtype == _BFLOAT16:
        with np.errstate(over="ignore"):
            out[...] = block.view(_BFLOAT16) if block.dtype == np.uint16 else block.astype(_BFLOAT16)
        return
    if block.dtype == np.uint16:
        np.left_shift(block, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
        return
    with np.errstate(over="ignore"):  # a float64 beyond float32 is an infinity
        np.copyto(out, block, casting="same_kind")


def _transpose(block: np.ndarray, out: np.ndarray) -> None:
    """Writes block.T to `out`, (columns, rows)."""
    rows, columns = block.shape
    buffer = np.empty((_PANEL_ROWS, _PANEL_COLUMNS + _PADDING), out.dtype)
    for row in range(0, rows, _PANEL_ROWS):
        for column in range(0, columns, _PANEL_COLUMNS):
            part = block[row : row + _PANEL_ROWS, column : column + _PANEL_COLUMNS]
            panel = buffer[: part.shape[0], : part.shape[1]]
            _convert(part, panel)
            np.copyto(out[column : column + part.shape[1], row : row + part.shape[0]], panel.T)
