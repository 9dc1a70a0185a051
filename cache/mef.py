"""MEF v1, the container of one compiled model: a header, sections and a table of contents that names and guards them.

    0        header, 4 KiB: magic, version, sizes, where the table is and its sha256, and a sha256 of all that
    4096     sections, each at a multiple of 4 KiB (native code: 64 KiB), zeros between them
    at end   table of contents, canonical JSON: a list of sections

All integers are little-endian; docs/mef.md has the format byte by byte. The artifact's id is the sha256 of the table;
the table has the sha256 of each section's stored bytes; so the id stands for the content. A file is read with pread
rather than through a mapping: a file that shrinks under a mapping kills the process, a short read is an error like any
other.
"""

import hashlib
import json
import os
import struct
import weakref
from typing import Any, BinaryIO, NoReturn, Self

import msgspec
import zstandard

from .. import CacheError
from .canonical import canonical_json
from .folder import retrying

VERSION = (1, 1)
MAGIC = b"\x89MEF\r\n\x1a\n"  # as PNG's: shows a transfer that changed line ends or cut the eighth bit
HEADER_BYTES = 4096
SECTION_ALIGNMENT = 4096
NATIVE_ALIGNMENT = 65536
# Sections are far smaller; the limit bounds what a crafted file can make us unpack.
MAX_RAW_BYTES = 4 << 30

MANIFEST = "manifest"  # graphs, buckets, cache groups, capabilities
COMPAT = "compat"  # what the host must offer
MODULE = "module"  # portable StableHLO
JAXPR = "jaxpr"  # the traced form, for debugging
NATIVE = "native"  # a PJRT executable
SIGNATURES = "signatures"  # names, shapes, dtypes, donation, kept arguments
WEIGHTS = "weights"  # names, shapes, dtypes and encodings; never weight bytes
CUSTOM_CALLS = "custom-calls"  # the handlers that must be registered
MEMORY = "memory"  # bytes of arguments, results and temporaries
COST = "cost"  # flops and bytes moved
PROBE = "probe"  # a seeded input and the expected output
PROVENANCE = "provenance"  # versions, flags, command, seconds

# magic, major, minor, header bytes, file bytes, table offset, table bytes, table sha256, optional and critical flags
_HEADER = struct.Struct("<8sHHIQQQ32sII")
_HEADER_DIGEST = slice(_HEADER.size, _HEADER.size + 32)  # the sha256 of the bytes before it
_KNOWN_CRITICAL_FLAGS = 0
_PIECE_BYTES = 1 << 20
_HINT = "it will be compiled again; delete the file if this message comes back"


class Section(msgspec.Struct, frozen=True):
    """One entry of the table of contents; `sha256` is over the stored bytes."""

    id: int
    kind: str
    name: str
    target: str
    offset: int
    stored_bytes: int
    raw_bytes: int
    codec: str
    sha256: str


class MefWriter:
    """Writes a MEF section by section; equal sections in equal order give equal bytes.

    `file` is a path, which is replaced, or a seekable binary file at its start. Leaving the `with` block without
    `finish` leaves a file without a header, which no reader accepts.
    """

    def __init__(self, file: str | os.PathLike[str] | BinaryIO) -> None:
        self._owned = isinstance(file, (str, os.PathLike))
        self._file: BinaryIO = open(file, "wb") if isinstance(file, (str, os.PathLike)) else file  # noqa: SIM115
        self._sections: list[Section] = []
        self._end = self._file.write(bytes(HEADER_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            self._file.close()

    def add(self, kind: str, name: str, data: bytes, *, target: str = "", codec: str = "zstd") -> Section:
        """Appends a section; `codec` is zstd or none, and none is used where zstd would not save space."""
        assert codec in ("zstd", "none"), codec
        assert (kind, name, target) not in {(s.kind, s.name, s.target) for s in self._sections}, (kind, name, target)
        stored = zstandard.ZstdCompressor(level=3).compress(data) if codec == "zstd" else data
        if len(stored) >= len(data):
            stored, codec = data, "none"
        alignment = NATIVE_ALIGNMENT if kind == NATIVE else SECTION_ALIGNMENT
        offset = -(-self._end // alignment) * alignment
        self._file.write(bytes(offset - self._end))
        self._file.write(stored)
        self._end = offset + len(stored)
        digest = hashlib.sha256(stored).hexdigest()
        section = Section(len(self._sections), kind, name, target, offset, len(stored), len(data), codec, digest)
        self._sections.append(section)
        return section

    def add_json(self, kind: str, name: str, value: Any, *, target: str = "") -> Section:
        """Appends a section of canonical JSON."""
        return self.add(kind, name, canonical_json(value), target=target)

    def finish(self) -> str:
        """Writes the table and the header, closes a file opened here, and returns the artifact id (64 hex digits)."""
        toc = canonical_json([msgspec.structs.asdict(section) for section in self._sections])
        digest = hashlib.sha256(toc)
        self._file.write(toc)
        header = _HEADER.pack(
            MAGIC, *VERSION, HEADER_BYTES, self._end + len(toc), self._end, len(toc), digest.digest(), 0, 0
        )
        self._file.seek(0)
        self._file.write(header + hashlib.sha256(header).digest())
        if self._owned:
            self._file.close()
        return digest.hexdigest()


class Mef:
    """A MEF opened for reading: header and table are checked at once, each section when it is read.

    Whatever is wrong with the bytes is a CacheError, and no length in the file is believed before it is bounded.
    """

    def __init__(self, source: bytes | int, size: int, origin: str) -> None:
        self._source = source
        self._size = size
        self._origin = origin
        self.id, self._sections = self._read_table()
        self._by_name = {(s.kind, s.name, s.target): s for s in self._sections}
        if len(self._by_name) != len(self._sections):
            self._fail("names a section twice")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Opens a file. Raises: CacheError when it is absent, unreadable, damaged, or of a newer version."""
        try:
            descriptor = retrying(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CacheError(f"{path} cannot be opened: {error.strerror}", _HINT) from error
        try:
            mef = cls(descriptor, os.fstat(descriptor).st_size, str(path))
        except BaseException:
            os.close(descriptor)
            raise
        weakref.finalize(mef, os.close, descriptor)
        return mef

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads a MEF held in memory. Raises: CacheError as `open` does."""
        return cls(data, len(data), "the artifact in memory")

    @property
    def size(self) -> int:
        """The file's bytes."""
        return self._size

    def content(self) -> bytes:
        """Returns the whole file, its sections unchecked."""
        return self._bytes(0, self._size)

    def sections(self) -> list[Section]:
        """Returns all sections in file order, of unknown kinds too."""
        return list(self._sections)

    def find(self, kind: str, name: str = "", target: str = "") -> Section | None:
        """Returns the section of that kind, name and target, or None."""
        return self._by_name.get((kind, name, target))

    def read(self, section: Section) -> bytes:
        """Returns a section's raw bytes, after checking the stored ones against their sha256.

        Raises: CacheError when they are damaged, or in a codec of a newer version.
        """
        stored = self._bytes(section.offset, section.stored_bytes)
        if hashlib.sha256(stored).hexdigest() != section.sha256:
            self._fail(f"has a damaged section {_label(section)}")
        if section.codec == "none":
            return stored
        if section.codec != "zstd":
            self._fail(f"has a section {_label(section)} in the unknown codec {section.codec!r}")
        return self._unpacked(section, stored)

    def check(self) -> None:
        """Reads the whole file: every section's hash, and that nothing stands between them. Raises: CacheError."""
        end = HEADER_BYTES
        for section in sorted(self._sections, key=lambda section: section.offset):
            self._check_padding(end, section.offset)
            self.read(section)
            end = section.offset + section.stored_bytes
        self._check_padding(end, self._table_offset)

    def json(self, kind: str, name: str = "", target: str = "") -> Any:
        """Returns the parsed JSON section of that kind, name and target. Raises: CacheError when absent or damaged."""
        section = self.find(kind, name, target)
        if section is None:
            self._fail(f"has no section {'/'.join(part for part in (kind, name, target) if part)}")
        try:
            return json.loads(self.read(section))
        except (ValueError, RecursionError) as error:
            self._fail(f"has a section {_label(section)} that is not JSON", error)

    def _read_table(self) -> tuple[str, list[Section]]:
        if self._size < HEADER_BYTES:
            self._fail("is truncated: it is shorter than a header")
        head = self._bytes(0, HEADER_BYTES)
        magic, major, minor, header, size, offset, length, digest, _, critical = _HEADER.unpack_from(head)
        if magic != MAGIC:
            self._fail("is not a MEF file")
        if major != VERSION[0] or minor < VERSION[1]:
            self._fail(
                f"has format {major}.{minor}, and this version reads {VERSION[0]}.x from {VERSION[0]}.{VERSION[1]}"
            )
        if head[_HEADER_DIGEST] != hashlib.sha256(head[: _HEADER.size]).digest():
            self._fail("has a damaged header")
        if minor == VERSION[1] and any(head[_HEADER_DIGEST.stop :]):
            self._fail("has a damaged header")
        if critical & ~_KNOWN_CRITICAL_FLAGS:
            self._fail(f"needs features that this version does not have (flags {critical:#x})")
        if size != self._size:
            self._fail(f"has {self._size} bytes, and its header says {size}")
        if header < HEADER_BYTES or offset < header or offset + length != size:
            self._fail("has a header that points outside the file")
        self._table_offset = offset
        toc = self._bytes(offset, length)
        found = hashlib.sha256(toc)
        if found.digest() != digest:
            self._fail("has a damaged table of contents")
        try:
            sections = msgspec.json.decode(toc, type=list[Section])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._fail("has a table of contents that cannot be read", error)
        for section in sections:
            if section.offset < header or section.stored_bytes < 0 or section.offset + section.stored_bytes > offset:
                self._fail(f"has a section {_label(section)} outside the file")
            if not 0 <= section.raw_bytes <= MAX_RAW_BYTES:
                self._fail(f"has a section {_label(section)} of {section.raw_bytes} bytes")
            if section.codec == "none" and section.raw_bytes != section.stored_bytes:
                self._fail(f"has a section {_label(section)} of contradictory lengths")
        return found.hexdigest(), sections

    def _bytes(self, offset: int, length: int) -> bytes:
        """Returns bytes that lie inside the file as it was when opened."""
        if isinstance(self._source, bytes):
            return self._source[offset : offset + length]
        pieces = []
        while length > 0:
            try:
                piece = retrying(os.pread, self._source, length, offset)
            except OSError as error:
                self._fail(f"cannot be read: {error.strerror}", error)
            if not piece:
                self._fail("was cut short while it was read")
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _unpacked(self, section: Section, stored: bytes) -> bytes:
        """Decompresses piece by piece, so that memory grows with what is there and not with what is claimed."""
        raw = bytearray()
        try:
            with zstandard.ZstdDecompressor().stream_reader(stored) as reader:
                while len(raw) <= section.raw_bytes and (piece := reader.read(_PIECE_BYTES)):
                    raw += piece
        except (zstandard.ZstdError, MemoryError) as error:
            self._fail(f"has a section {_label(section)} that cannot be decompressed", error)
        if len(raw) != section.raw_bytes:
            self._fail(f"has a section {_label(section)} that is not {section.raw_bytes} bytes long")
        return bytes(raw)

    def _check_padding(self, start: int, stop: int) -> None:
        if start > stop:
            self._fail("has sections that overlap")
        if any(self._bytes(start, stop - start)):
            self._fail(f"has something between its sections, at byte {start}")

    def _fail(self, what: str, cause: BaseException | None = None) -> NoReturn:
        raise CacheError(f"{self._origin} {what}", _HINT) from cause


def _label(section: Section) -> str:
    return "/".join(part for part in (section.kind, section.name, section.target) if part)[:120]
