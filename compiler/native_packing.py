"""Weights as the kernels read them: quantized into GGUF's blocks, and packed into panels."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from .native_functions import Encoding, Epilogue, Functions, address, check, int64, pointer

QuantizedEncoding = Literal["q8_0", "q4_0", "q4_k", "q6_k"]
Columns = Literal["plain", "gate", "up"]

BLOCKS: dict[str, tuple[int, int]] = {"q8_0": (32, 34), "q4_0": (32, 18), "q4_k": (256, 144), "q6_k": (256, 210)}
"""Inputs and bytes of GGUF's blocks, of which the quantized encodings are made."""

_SOURCES = ("float32", "bfloat16", "uint8")


class _Packing(ctypes.Structure):
    _fields_ = (
        ("encoding", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("source_kind", ctypes.c_int),
        ("source", pointer),
        *(
            (name, int64)
            for name in ("input_stride", "output_stride", "num_inputs", "num_columns", "first_column", "total_columns")
        ),
        ("packed", pointer),
    )


class Packing(Functions):
    """The part of the library that writes weights."""

    TEXTS = ("pack", "quantize")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.function("packed_bytes").restype = int64
        self.function("packed_bytes").argtypes = [ctypes.c_int, ctypes.c_int, int64, int64]

    def packed_bytes(self, encoding: Encoding, inputs: int, outputs: int, *, gated: bool = False) -> int:
        """Bytes of a packed matrix; if `gated`, one of gate and up, each of `outputs` columns."""
        epilogue = get_args(Epilogue).index("swiglu" if gated else "none")
        return self.function("packed_bytes")(get_args(Encoding).index(encoding), epilogue, inputs, outputs)

    def quantize(self, elements: np.ndarray, encoding: QuantizedEncoding) -> np.ndarray:
        """GGUF's blocks of float32 elements (rows, inputs), as (rows, bytes) uint8: what `pack` makes of them.

        q8_0 and q4_0 are those of GGUF's own quantizer; q4_k and q6_k come from a search for scales of least squared
        error. Raises ValueError unless inputs are whole blocks: 32 for q8_0 and q4_0, 256 for q4_k and q6_k.
        """
        block, nbytes = BLOCKS[encoding]
        blocks = np.empty((elements.shape[0], elements.shape[1] // block * nbytes), np.uint8)
        if elements.shape[1] % block:
            raise ValueError(f"{encoding} needs a multiple of {block} inputs")
        arguments = (
            get_args(Encoding).index(encoding),
            pointer(address(elements, np.float32)),
            int64(elements.size),
        )
        check(self.function("quantize")(*arguments, pointer(blocks.ctypes.data)))
        return blocks

    def pack(
        self,
        source: np.ndarray,
        packed: np.ndarray,
        encoding: Encoding,
        *,
        columns: Columns = "plain",
        first_column: int = 0,
        total_columns: int | None = None,
    ) -> None:
        """Writes a matrix, or some of its columns, into packed weights.

        source:        (inputs, outputs) float32 or bfloat16, with any strides: pass the transpose of a checkpoint's;
                       for a quantized encoding also GGUF's blocks of it, contiguous (outputs, bytes of a row) uint8
        packed:        packed_bytes of uint8, of any shape, zeroed before the first of its parts
        columns:       "gate" and "up" for the two halves of a gated layer's matrix
        first_column:  where the columns go in a matrix of `total_columns` that is fused from several
        Raises ValueError if shapes, dtypes or sizes do not fit.
        """
        inputs, outputs = _matrix_shape(source, encoding)
        total = outputs if total_columns is None else total_columns
        if packed.nbytes != self.packed_bytes(encoding, inputs, total, gated=columns != "plain"):
            raise ValueError(f"packed weights of {packed.nbytes} bytes do not fit {inputs} inputs, {total} outputs")
        call = _Packing(
            encoding=get_args(Encoding).index(encoding),
            columns=get_args(Columns).index(columns),
            source_kind=_SOURCES.index(source.dtype.name),
            source=source.ctypes.data,
            input_stride=source.strides[0] // source.itemsize,
            output_stride=source.strides[1] // source.itemsize,
            num_inputs=inputs,
            num_columns=outputs,
            first_column=first_column,
            total_columns=total,
            packed=address(packed, np.uint8, writable=True),
        )
        check(self.function("pack")(ctypes.byref(call)))


def _matrix_shape(source: np.ndarray, encoding: Encoding) -> tuple[int, int]:
    """Inputs and outputs of what `pack` is given. Raises ValueError for what it does not take."""
    are_blocks = source.dtype == np.uint8
    if source.dtype.name not in _SOURCES or (are_blocks and not (encoding in BLOCKS and source.flags.c_contiguous)):
        raise ValueError(
            f"weights are float32, bfloat16 or blocks of their encoding, not {source.dtype} for {encoding}"
        )
    if not are_blocks:
        inputs, outputs = source.shape
        return inputs, outputs
    block, nbytes = BLOCKS[encoding]
    if source.shape[1] % nbytes:
        raise ValueError(f"rows of {encoding} are blocks of {nbytes} bytes, not {source.shape[1]}")
    return source.shape[1] // nbytes * block, source.shape[0]
