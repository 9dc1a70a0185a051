"""Stand-ins for the ROCm libraries that AMD's plugin links, so that it can compile on a host without ROCm.

The plugin asks for eight shared libraries when it is loaded and calls none of them to compile. For each, a minimal ELF
file is written that defines what the plugin takes from ROCm: functions that say "no device". They are loaded by the
compile process alone, by path, and only where the real ones are not installed.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from ... import CompileError

_ROCM_LIBRARY = re.compile(r"lib(roc|rccl|hip|MIOpen|amd)")
_ROCM_FUNCTION = re.compile(r"(__hip|hip|amdsmi|rsmi|miopen|nccl|roc|hsa)\w*")
_SAYS_TEXT = re.compile(r"(Error|status).*(String|Name|_string|_name)$")

_SHT_DYNAMIC, _SHT_DYNSYM = 6, 11
_DT_NEEDED = 1
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551

# x86-64: what the functions answer. 100 is hipErrorNoDevice and an error of every other library of ROCm.
_ZERO = b"\x31\xc0\xc3"  # xor eax, eax; ret
_NO_DEVICE = b"\xb8\x64\x00\x00\x00\xc3"  # mov eax, 100; ret
_ADDRESS = b"\x48\x8d\x05"  # lea rax, [rip + offset]; ret, for text and for memory


def load(plugin: Path, folder: Path) -> list[str]:
    """Writes a stand-in for every ROCm library of `plugin` that this host lacks, and loads it into this process.

    Returns the names of the libraries that stand-ins were loaded for; none on a host with ROCm. Raises CompileError
    for a plugin that is not an x86-64 ELF file.
    """
    needed, undefined = _links(plugin)
    absent = [name for name in needed if _ROCM_LIBRARY.match(name) and not _loads(name)]
    functions = sorted(name for name in undefined if _ROCM_FUNCTION.fullmatch(name))
    for i, name in enumerate(absent):
        path = folder / name
        # One library defines everything; the others only have to be there under their names.
        path.write_bytes(_shared_library(name, functions if i == 0 else []))
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    return absent


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


# --- reading the plugin --------------------------------------------------------------------------------------------


def _links(path: Path) -> tuple[list[str], set[str]]:
    """The libraries that a shared library needs, and the symbols that it does not define."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18)[0] != 62:
            raise CompileError(f"{path} is no x86-64 shared library", "Install the plugin anew.")
        sections = list(_sections(data))
        needed, undefined = [], set()
        for kind, offset, size, link in sections:
            names = sections[link][1]
            if kind == _SHT_DYNAMIC:
                entries = struct.iter_unpack("<qQ", data[offset : offset + size])
                needed = [_text(data, names + value) for tag, value in entries if tag == _DT_NEEDED]
            elif kind == _SHT_DYNSYM:
                rows = struct.iter_unpack("<IBBHQQ", data[offset : offset + size])
                undefined = {_text(data, names + name) for name, _, _, section, _, _ in rows if section == 0}
        return needed, undefined


def _sections(data: mmap.mmap) -> Iterator[tuple[int, int, int, int]]:
    """Type, offset, size and linked section of each section."""
    (start,) = struct.unpack_from("<Q", data, 40)
    entry_bytes, count = struct.unpack_from("<HH", data, 58)
    for i in range(count):
        _, kind, _, _, offset, size, link = struct.unpack_from("<IIQQQQI", data, start + i * entry_bytes)
        yield kind, offset, size, link


def _text(data: mmap.mmap, at: int) -> str:
    return data[at : data.find(b"\0", at)].decode()


# --- writing a stand-in --------------------------------------------------------------------------------------------


_HEADERS, _SYMBOL, _FUNCTION = 64 + 4 * 56, 24, 16  # bytes of all headers, of a symbol, and of the code of a function
_TEXT_BYTES, _MEMORY_BYTES = 3 * _FUNCTION, 64


class _Layout:
    """Where the parts of a stand-in lie in its file, and in memory: both are the same here."""

    def __init__(self, num_functions: int, string_bytes: int) -> None:
        self.symbols = _HEADERS
        self.strings = self.symbols + _SYMBOL * (num_functions + 1)
        self.hashes = _aligned(self.strings + string_bytes, 8)
        # Two counts, one bucket, and a chain through all symbols.
        self.text = _aligned(self.hashes + 4 * (2 + 1 + num_functions + 1), 16)
        self.data = _aligned(self.text + _TEXT_BYTES, 4096)
        tags = [(14, 1), (4, self.hashes), (5, self.strings), (6, self.symbols), (10, string_bytes), (11, _SYMBOL)]
        self.dynamic = b"".join(struct.pack("<qQ", tag, value) for tag, value in [*tags, (0, 0)])
        self.memory = self.data + len(self.dynamic)
        self.end = self.memory + _MEMORY_BYTES

    def headers(self) -> bytes:
        """Of the file, then of the segments: code, data, dynamic section, and a stack that is not executed."""
        text, data = self.text + _TEXT_BYTES, self.end - self.data
        segments = [
            (_PT_LOAD, 5, 0, 0, 0, text, text, 4096),
            (_PT_LOAD, 6, self.data, self.data, self.data, data, data, 4096),
            (_PT_DYNAMIC, 6, self.data, self.data, self.data, len(self.dynamic), len(self.dynamic), 8),
            (_PT_GNU_STACK, 6, 0, 0, 0, 0, 0, 16),
        ]
        file = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0)
        return file + b"".join(struct.pack("<IIQQQQQQ", *segment) for segment in segments)


def _shared_library(name: str, functions: list[str]) -> bytes:
    """An x86-64 ELF library called `name` that defines these functions: headers, symbols, code, then data."""
    strings = b"\0" + b"".join(symbol.encode() + b"\0" for symbol in [name, *functions])
    layout = _Layout(len(functions), len(strings))
    # Text at the start of the memory, and zeros behind it for handles that are written through.
    address = _ADDRESS + struct.pack("<i", layout.memory - (layout.text + 2 * _FUNCTION + 7)) + b"\xc3"
    text = b"".join(code.ljust(_FUNCTION, b"\xcc") for code in (_ZERO, _NO_DEVICE)) + address

    symbols, name_at = [bytes(_SYMBOL)], 1 + len(name) + 1
    for function in functions:
        which = 2 if _gives_address(function) else 0 if _succeeds(function) else 1
        at = layout.text + which * _FUNCTION  # of a global function, in a section
        symbols.append(struct.pack("<IBBHQQ", name_at, 0x12, 0, 1, at, _FUNCTION))
        name_at += len(function) + 1

    # One bucket whose chain visits every symbol in turn; symbol 0 stands for none.
    chain = [0, *range(2, len(functions) + 1), 0] if functions else [0]
    hashes = struct.pack(f"<{3 + len(chain)}I", 1, len(functions) + 1, min(1, len(functions)), *chain)
    image = bytearray(layout.end)
    for at, part in (
        (0, layout.headers()),
        (layout.symbols, b"".join(symbols)),
        (layout.strings, strings),
        (layout.hashes, hashes),
        (layout.text, text),
        (layout.data, layout.dynamic),
        (layout.memory, b"stub\0"),
    ):
        image[at : at + len(part)] = part
    return bytes(image)


def _gives_address(function: str) -> bool:
    """Whether the result is text or a handle, which callers read."""
    return function == "__hipRegisterFatBinary" or _SAYS_TEXT.search(function) is not None


def _succeeds(function: str) -> bool:
    """Whether the function runs when the plugin is loaded, where an error would end the process."""
    return function.startswith("__hip")


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
