"""The safetensors format: a file's header, checked against the file before a byte of its data is used. Imports no jax.

Source: "Format" in the README of huggingface/safetensors; the checks are those of its `safetensors::tensor`.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from .. import WeightError

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 64  # numpy's

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip

_DOWNLOAD_AGAIN = "The file is damaged or its download is incomplete: download it again."


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` counts bytes from the start of `file`; `shape` is the stored one.

    dtype:       one of ITEM_BYTES, or a type of GGUF
    interleaved: the rows of each of so many heads lie as 0, D/2, 1, D/2 + 1, ...; 0 where rows lie in order
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    interleaved: int = 0


@dataclass(frozen=True)
class Header:
    """A checked header: its tensors by name, and the bytes it was parsed from."""

    tensors: dict[str, TensorInfo]
    raw: bytes


def read_header(file: Path) -> Header:
    """Reads and checks the header of `file`; raises WeightError when it is damaged, cut off or not safetensors."""
    try:
        with file.open("rb") as stream:
            raw, file_bytes = _raw_header(file, stream)
    except OSError as error:
        raise WeightError(f"{file} cannot be read: {error.strerror}", "Check the path and its permissions.") from None
    fields = _parse(file, raw)
    fields.pop("__metadata__", None)
    data_start = 8 + len(raw)
    tensors = {name: _tensor(file, name, row, data_start) for name, row in fields.items()}
    _check_layout(file, tensors, data_start, file_bytes)
    return Header(tensors, raw)


def _raw_header(file: Path, stream: BinaryIO) -> tuple[bytes, int]:
    file_bytes = os.fstat(stream.fileno()).st_size
    start = stream.read(8)
    if start == b"version " and stream.read(22) == b"https://git-lfs.github":
        raise WeightError(f"{file} is a Git LFS pointer, not the weights", "Fetch the weights with `git lfs pull`.")
    if len(start) < 8:
        raise WeightError(f"{file} is truncated: {file_bytes} bytes hold no safetensors header", _DOWNLOAD_AGAIN)
    (header_bytes,) = struct.unpack("<Q", start)
    if header_bytes > MAX_HEADER_BYTES:
        raise WeightError(
            f"{file} claims a header of {header_bytes} bytes, over the limit of {MAX_HEADER_BYTES}",
            "This is not a safetensors file, or its first bytes are damaged: download it again.",
        )
    stream.seek(8)
    raw = stream.read(header_bytes)
    if len(raw) < header_bytes:
        raise WeightError(
            f"{file} is truncated: its header has {header_bytes} bytes, the whole file {file_bytes}", _DOWNLOAD_AGAIN
        )
    return raw, file_bytes


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        if not isinstance(fields, dict):
            raise ValueError(f"it is {_short(fields)}")
        json.dumps(list(fields), ensure_ascii=False).encode()  # a lone surrogate is JSON to Python, yet no Unicode
    except RecursionError:
        raise WeightError(f"{file}: the header is nested too deeply to be one", _DOWNLOAD_AGAIN) from None
    except ValueError as error:
        raise WeightError(f"{file}: the header is not a JSON object: {error}", _DOWNLOAD_AGAIN) from None
    return fields


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is given twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _tensor(file: Path, name: str, row: Any, data_start: int) -> TensorInfo:
    def damaged(what: str) -> WeightError:
        return WeightError(f"{file}: the header entry of {name!r} is damaged: {what}", _DOWNLOAD_AGAIN)

    if not isinstance(row, dict):
        raise damaged("it is not an object")
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise damaged(f"dtype {_short(dtype)} is not known")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise damaged(f"shape {_short(shape)} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise damaged(f"data_offsets {_short(offsets)} are not two offsets")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise damaged(f"{dtype} of shape {_short(shape)} takes another size than its offsets, {begin} to {end}")
    return TensorInfo(file, dtype, tuple(shape), data_start + begin, nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_layout(file: Path, tensors: dict[str, TensorInfo], data_start: int, file_bytes: int) -> None:
    """The tensors follow each other from the header's end to the file's, without gap or overlap."""
    expected = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != expected:
            what = "overlaps the tensor before it" if tensor.offset < expected else "leaves a gap before it"
            raise WeightError(f"{file}: the header lies: {name!r} {what}", _DOWNLOAD_AGAIN)
        expected += tensor.nbytes
    if file_bytes < expected:
        raise WeightError(
            f"{file} is truncated: its header asks for {expected} bytes, the file has {file_bytes}", _DOWNLOAD_AGAIN
        )
    if file_bytes > expected:
        raise WeightError(f"{file} is {file_bytes - expected} bytes longer than its header says", _DOWNLOAD_AGAIN)
