"""The file of prepared weights, v1: its header and its table of contents, and the checks both must pass.

    header    4 KiB: magic, version, sizes, where the TOC lies and its sha256
    data      the tensors exactly as an arena holds them, each at a multiple of 4 KiB
    TOC       JSON: packing, tensors, and one xxh3-64 for every 4 MiB of the data

The id of a file is the sha256 of its TOC, and so covers the data. Imports no jax.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from .. import CacheError
from ..cache.folder import retrying
from ..compiler.weights import ALIGNMENT
from .arena import Slot, place

HEADER_BYTES = 4096
CHUNK_BYTES = 4 << 20
PACKING = "rows-or-panels-32-v1"
"""How matrices lie: in rows, or as bytes in panels of 32 outputs for the CPU kernels. A graph's signature says which,
of which encoding, and in which order; the factors of the key under which they were prepared say it too."""

_DTYPES = ("float32", "bfloat16", "uint8")

_MAGIC = b"\x89MAXWTS\n"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ32s")  # magic, version, header bytes, file bytes, TOC offset, TOC bytes, TOC sha256
_MAX_TOC_BYTES = 256 << 20


@dataclass(frozen=True)
class Contents:
    """A checked table of contents: where the tensors lie in the data, and the hash of each chunk of it."""

    id: str
    slots: tuple[Slot, ...]
    chunks: tuple[int, ...]

    @property
    def data_bytes(self) -> int:
        return data_bytes(self.slots)


def data_bytes(slots: Sequence[Slot]) -> int:
    """The size of the data, which is that of an arena of these slots."""
    return slots[-1].stop if slots else 0


def write_contents(descriptor: int, slots: Sequence[Slot], chunks: Sequence[int]) -> str:
    """Writes the TOC behind the data and then the header, which makes the file whole; returns its id."""
    toc = json.dumps(
        {
            "packing": PACKING,
            "chunk_bytes": CHUNK_BYTES,
            "chunks": [f"{chunk:016x}" for chunk in chunks],
            "tensors": [
                {"name": slot.name, "dtype": slot.dtype.name, "shape": slot.shape, "offset": slot.offset}
                for slot in slots
            ],
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
    digest = hashlib.sha256(toc)
    offset = HEADER_BYTES + data_bytes(slots)
    header = _HEADER.pack(_MAGIC, _VERSION, HEADER_BYTES, offset + len(toc), offset, len(toc), digest.digest())
    write_at(descriptor, toc, offset)
    write_at(descriptor, header.ljust(HEADER_BYTES, b"\0"), 0)
    return digest.hexdigest()


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Writes all of `content`; raises OSError."""
    buffer = memoryview(content)
    while buffer:
        written = os.pwrite(descriptor, buffer, offset)
        buffer, offset = buffer[written:], offset + written


def damaged(path: Path, what: str) -> CacheError:
    return CacheError(f"{path}: {what}", "The weights are prepared again from the checkpoint.")


def read_contents(descriptor: int, path: Path) -> Contents:
    """Reads header and TOC; raises CacheError for a damaged, truncated, foreign or otherwise packed file."""
    header = retrying(os.pread, descriptor, HEADER_BYTES, 0)
    if header[: len(_MAGIC)] != _MAGIC:
        raise damaged(path, "not a file of prepared weights")
    if len(header) < HEADER_BYTES:
        raise damaged(path, f"truncated to {len(header)} bytes")
    _, version, header_bytes, file_bytes, offset, toc_bytes, digest = _HEADER.unpack_from(header)
    if version != _VERSION:
        raise damaged(path, f"version {version} of the format, this program reads version {_VERSION}")
    if header_bytes != HEADER_BYTES or any(header[_HEADER.size :]):
        raise damaged(path, "the header is damaged")
    actual_bytes = os.fstat(descriptor).st_size
    if file_bytes != actual_bytes:
        raise damaged(path, f"{actual_bytes} bytes long, its header says {file_bytes}")
    if offset < HEADER_BYTES or toc_bytes > _MAX_TOC_BYTES or offset + toc_bytes != file_bytes:
        raise damaged(path, "the header is damaged")
    toc = retrying(os.pread, descriptor, toc_bytes, offset)
    if hashlib.sha256(toc).digest() != digest:
        raise damaged(path, "the table of contents is damaged")
    try:
        return _parse(toc, digest.hex(), offset - HEADER_BYTES)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, f"the table of contents cannot be used: {error}") from None


def check_file(path: Path, expected_id: str) -> None:
    """Reads the whole file and compares every hash; raises CacheError for a damaged one and for another's content."""
    try:
        descriptor = retrying(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None
    try:
        contents = read_contents(descriptor, path)
        if contents.id != expected_id:
            raise damaged(path, f"its id is {contents.id[:12]}, {expected_id[:12]} is needed")
        stop = HEADER_BYTES + contents.data_bytes
        for offset, digest in zip(range(HEADER_BYTES, stop, CHUNK_BYTES), contents.chunks, strict=True):
            chunk = retrying(os.pread, descriptor, min(CHUNK_BYTES, stop - offset), offset)
            if xxhash.xxh3_64_intdigest(chunk) != digest:
                raise damaged(path, f"the chunk at byte {offset} is damaged")
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _parse(toc: bytes, identity: str, size: int) -> Contents:
    """Checks what the sha256 cannot: that another program's TOC means what this one would write."""
    fields: dict[str, Any] = json.loads(toc)
    if fields["packing"] != PACKING:
        raise ValueError(f"packed as {fields['packing']}, needed is {PACKING}")
    rows = fields["tensors"]
    if any(
        row["dtype"] not in _DTYPES or not all(type(axis) is int and axis >= 0 for axis in row["shape"]) for row in rows
    ):
        raise ValueError("a tensor's dtype or shape is wrong")
    if len({row["name"] for row in rows}) < len(rows):
        raise ValueError("two tensors have one name")
    slots = place((row["name"], row["shape"], row["dtype"]) for row in rows)
    if [slot.offset for slot in slots] != [row["offset"] for row in rows] or data_bytes(slots) != size:
        raise ValueError(f"tensors do not follow each other at multiples of {ALIGNMENT} bytes")
    chunks = tuple(int(chunk, 16) for chunk in fields["chunks"])
    if fields["chunk_bytes"] != CHUNK_BYTES or len(chunks) != -(-size // CHUNK_BYTES):
        raise ValueError("the chunks do not cover the data")
    return Contents(identity, slots, chunks)
