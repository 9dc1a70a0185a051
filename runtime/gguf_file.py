"""The GGUF format: a file's metadata and tensors, checked against the file before a byte of its data is used.

Source: docs/gguf.md of ggml; the limits are those of its `gguf_init_from_file`. The `gguf` package reads the same
files, but trusts every size in them and makes an array of each string: seconds for 128k of them. Imports no jax.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from .. import WeightError
from .safetensors_file import TensorInfo

MAX_HEADER_BYTES = 512_000_000
MAX_RANK = 4

BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8),
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_K": (256, 144), "Q6_K": (256, 210),
}  # fmt: skip
"""The types that are read: how many values of a row share a block, and its bytes."""

_TYPE_IDS = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 8: "Q8_0", 2: "Q4_0", 12: "Q4_K", 14: "Q6_K"}
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q").unpack_from
_FIRST_READ = 1 << 20
_SHORT_ARRAY = 1024
"""Numbers; lists of so many are decoded at once: settings of layers, as opposed to those of tokens."""

_DOWNLOAD_AGAIN = "The file is damaged or its download is incomplete: download it again."


@dataclass(frozen=True)
class Header:
    """A checked header: metadata by key, tensors by their names in the file, and its bytes: how many, their sha256.

    Metadata are ints, floats, bools, strings, and sequences of one of these.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Place:
    """Where an array lies: bytes of the header from `at` on, which hold `count` elements of this kind."""

    kind: int
    at: int
    nbytes: int
    count: int


class LongArray[T](Sequence[T]):
    """An array as it lies in the header; decoded when it is iterated, as most starts need none of them."""

    def __init__(self, raw: bytes, place: Place) -> None:
        """raw: its bytes"""
        self._raw, self.place = raw, place

    @staticmethod
    def of(raw: bytes, place: Place) -> LongArray[Any]:
        """Strings or numbers, as its kind says."""
        return Strings(raw, place) if place.kind == _STRING else Numbers(raw, place)

    def __len__(self) -> int:
        return self.place.count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return list(self)[index]


class Numbers(LongArray[Any]):
    """Numbers of one kind."""

    def __iter__(self) -> Iterator[Any]:
        return iter(np.frombuffer(self._raw, _NUMBERS[self.place.kind]).tolist())


class Strings(LongArray[str]):
    """Strings, each behind its length."""

    def __iter__(self) -> Iterator[str]:
        """Raises UnicodeDecodeError, a ValueError, for bytes that are no UTF-8."""
        raw, at = self._raw, 0
        for _ in range(len(self)):
            end = at + 8 + _LENGTH(raw, at)[0]
            yield str(raw[at + 8 : end], "utf-8")
            at = end


def read_header(file: Path) -> Header:
    """Reads and checks the header of `file`; raises WeightError when it is damaged, cut off or not GGUF."""
    try:
        with file.open("rb") as stream:
            return _Parser(file, stream).header()
    except OSError as error:
        raise WeightError(f"{file} cannot be read: {error.strerror}", "Check the path and its permissions.") from None


class _Parser:
    """Walks through a header; what it reads of the file grows with what the header has been found to need."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream = file, stream
        self._file_bytes = os.fstat(stream.fileno()).st_size
        self._buffer = bytearray()
        self._at = 0

    def header(self) -> Header:
        self._check_start()
        num_tensors, num_keys = self._number("<u8"), self._number("<u8")
        # The least that a tensor and a key take, so that no absurd count is ever looped over.
        if num_tensors * 24 + num_keys * 13 > self._file_bytes:
            raise self._damaged(f"it claims {num_tensors} tensors and {num_keys} keys in {self._file_bytes} bytes")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string("a key")
            if key in metadata:
                raise self._damaged(f"the key {_short(key)} is given twice")
            metadata[key] = self._value(key, self._number("<u4"))
        rows = [self._tensor() for _ in range(num_tensors)]
        raw = bytes(self._buffer[: self._at])
        tensors = self._placed(rows, self._alignment(metadata))
        return Header(self._file, metadata, tensors, len(raw), hashlib.sha256(raw).hexdigest())

    def _check_start(self) -> None:
        self._buffer += self._stream.read(_FIRST_READ)
        start = bytes(self._buffer[:24])
        if start.startswith(b"version https://git-lfs"):
            raise WeightError(
                f"{self._file} is a Git LFS pointer, not the weights", "Fetch the weights with `git lfs pull`."
            )
        if start[:4] != b"GGUF":
            raise WeightError(
                f"{self._file} is no GGUF file: it starts with {start[:4]!r}", "Give a .gguf file, or a folder."
            )
        if len(start) < 24:
            raise self._truncated()
        (version,) = struct.unpack_from("<I", start, 4)
        if version not in (2, 3):
            what = "of big-endian machines" if version and version & 0xFFFF == 0 else f"of version {version}"
            raise WeightError(
                f"{self._file} is a GGUF file {what}", "Versions 2 and 3 for little-endian machines are read."
            )
        self._at = 8

    def _fill(self, count: int) -> None:
        """Reads on until `count` bytes lie ahead, if the file has them."""
        needed = self._at + count - len(self._buffer)
        if 0 < needed <= self._file_bytes - len(self._buffer):
            if self._at + count > MAX_HEADER_BYTES:
                raise self._damaged(f"its header is over {MAX_HEADER_BYTES} bytes long")
            self._buffer += self._stream.read(max(needed, _FIRST_READ, len(self._buffer)))

    def _take(self, count: int) -> int:
        """Moves on by `count` bytes and returns where they start in the buffer; raises WeightError at the end."""
        start = self._at
        if start + count > len(self._buffer):
            self._fill(count)
            if start + count > len(self._buffer):
                raise self._truncated()
        self._at = start + count
        return start

    def _number(self, kind: str) -> Any:
        size = np.dtype(kind).itemsize
        start = self._take(size)
        return np.frombuffer(bytes(self._buffer[start : start + size]), kind)[0].item()

    def _string(self, what: str) -> str:
        start = self._take(self._number("<u8"))
        try:
            return str(self._buffer[start : self._at], "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8: {error}") from None

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {_short(key)}")
        if kind == _ARRAY:
            return self._array(key, self._number("<u4"), self._number("<u8"))
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        raise self._damaged(f"the value of {_short(key)} is of the unknown kind {kind}")

    def _array(self, key: str, kind: int, count: int) -> Sequence[Any]:
        if kind == _STRING:
            return self._strings(count)
        if kind not in _NUMBERS:
            raise self._damaged(f"the value of {_short(key)} is an array of the unknown kind {kind}")
        start = self._take(count * np.dtype(_NUMBERS[kind]).itemsize)
        found = Numbers(bytes(self._buffer[start : self._at]), Place(kind, start, self._at - start, count))
        return found if count > _SHORT_ARRAY else list(found)

    def _strings(self, count: int) -> Strings:
        if 8 * count > self._file_bytes:
            raise self._truncated()
        first = self._at
        for _ in range(count):
            at = self._at
            if at + 8 > len(self._buffer):
                self._take(8)
            end = at + 8 + _LENGTH(self._buffer, at)[0]
            self._at = at
            if end > len(self._buffer):
                self._take(end - at)
            self._at = end
        return Strings(bytes(self._buffer[first : self._at]), Place(_STRING, first, self._at - first, count))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with the row's length last, type and offset in the data."""
        name, rank = self._string("a tensor's name"), self._number("<u4")
        if not 1 <= rank <= MAX_RANK:
            raise self._damaged(f"the tensor {_short(name)} has {rank} dimensions")
        shape = tuple(self._number("<u8") for _ in range(rank))[::-1]
        if math.prod(shape) >= 1 << 63:
            raise self._damaged(f"the tensor {_short(name)} has the shape {shape}")
        return name, shape, self._number("<u4"), self._number("<u8")

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {_short(alignment)}, not a power of two")
        return alignment

    def _placed(self, rows: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, TensorInfo]:
        """The tensors where they lie in the file: inside it, at aligned offsets, none over another."""
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in rows:
            if name in tensors:
                raise self._damaged(f"the tensor {_short(name)} is given twice")
            if offset % alignment:
                raise self._damaged(f"the tensor {_short(name)} lies at {offset}, no multiple of {alignment}")
            tensors[name] = self._info(name, shape, kind, start + offset)
        end, before = start, ""
        for name, at in sorted(tensors.items(), key=lambda item: item[1].offset):
            if at.offset < end:
                raise self._damaged(f"the tensors {_short(before)} and {_short(name)} overlap")
            end, before = at.offset + at.nbytes, name
        if end > self._file_bytes:
            raise WeightError(
                f"{self._file} is truncated: {_short(before)} ends at byte {end}, the file at {self._file_bytes}",
                _DOWNLOAD_AGAIN,
            )
        return tensors

    def _info(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        type_name = _TYPE_IDS.get(kind)
        if type_name is None:
            raise WeightError(
                f"{self._file}: the tensor {_short(name)} is of the type {_name_of(kind)}, which is not read",
                f"Use a file in {', '.join(BLOCKS)}, such as one quantized as Q4_K_M, Q6_K or Q8_0.",
            )
        block, block_bytes = BLOCKS[type_name]
        if shape[-1] % block:
            raise self._damaged(f"{_short(name)}: rows of {shape[-1]} are no whole blocks of {type_name}, {block} each")
        return TensorInfo(self._file, type_name, shape, offset, math.prod(shape) // block * block_bytes)

    def _damaged(self, what: str) -> WeightError:
        return WeightError(f"{self._file}: {what}", _DOWNLOAD_AGAIN)

    def _truncated(self) -> WeightError:
        return WeightError(
            f"{self._file} is truncated: its {self._file_bytes} bytes end inside the header", _DOWNLOAD_AGAIN
        )


def _name_of(kind: int) -> str:
    """The name of a type that is not read; the package is loaded to name it only."""
    from gguf import GGMLQuantizationType

    return next((known.name for known in GGMLQuantizationType if known.value == kind), f"number {kind}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
