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


def _shared_library(name: str, functions: list[str]) -> bytes:
    """An x86-64 ELF library called `name` that defines these functions: headers, symbols, code, then data."""
    strings = b"\0" + b"".join(symbol.encode() + b"\0" for symbol in [name, *functions])
    code_at = {_ZERO: 0, _NO_DEVICE: 16}
    headers, symbol_bytes = 64 + 4 * 56, 24 * (len(functions) + 1)
    hash_words = 2 + 1 + len(functions) + 1  # one bucket, and a chain through all symbols
    symbols_at = headers
    strings_at = symbols_at + symbol_bytes
    hash_at = _aligned(strings_at + len(strings), 8)
    text_at = _aligned(hash_at + 4 * hash_words, 16)
    data_at = _aligned(text_at + 48, 4096)
    dynamic = [(14, 1), (4, hash_at), (5, strings_at), (6, symbols_at), (10, len(strings)), (11, 24), (0, 0)]
    memory_at = data_at + 16 * len(dynamic)
    end = memory_at + 64

    # Text at the start of the memory, and zeros behind it for handles that are written through.
    text = _ZERO.ljust(16, b"\xcc") + _NO_DEVICE.ljust(16, b"\xcc")
    text += _ADDRESS + struct.pack("<i", memory_at - (text_at + 32 + 7)) + b"\xc3"

    symbols, name_at = [bytes(24)], 1 + len(name) + 1
    for function in functions:
        at = text_at + (32 if _gives_address(function) else code_at[_ZERO if _succeeds(function) else _NO_DEVICE])
        symbols.append(struct.pack("<IBBHQQ", name_at, 0x12, 0, 1, at, 16))  # global function, in a section
        name_at += len(function) + 1

    image = bytearray(end)
    image[:64] = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0)
    image[64:headers] = b"".join(
        [
            struct.pack("<IIQQQQQQ", _PT_LOAD, 5, 0, 0, 0, text_at + 48, text_at + 48, 4096),
            struct.pack("<IIQQQQQQ", _PT_LOAD, 6, data_at, data_at, data_at, end - data_at, end - data_at, 4096),
            struct.pack(
                "<IIQQQQQQ", _PT_DYNAMIC, 6, data_at, data_at, data_at, 16 * len(dynamic), 16 * len(dynamic), 8
            ),
            struct.pack("<IIQQQQQQ", _PT_GNU_STACK, 6, 0, 0, 0, 0, 0, 16),
        ]
    )
    # One bucket whose chain visits every symbol in turn; symbol 0 stands for none.
    chain = [0, *range(2, len(functions) + 1), 0] if functions else [0]
    table = struct.pack(f"<{hash_words}I", 1, len(functions) + 1, min(1, len(functions)), *chain)
    for at, part in ((symbols_at, b"".join(symbols)), (strings_at, strings), (hash_at, table), (text_at, text)):
        image[at : at + len(part)] = part
    image[data_at:memory_at] = b"".join(struct.pack("<qQ", tag, value) for tag, value in dynamic)
    image[memory_at : memory_at + 5] = b"stub\0"
    return bytes(image)


def _gives_address(function: str) -> bool:
    """Whether the result is text or a handle, which callers read."""
    return function == "__hipRegisterFatBinary" or _SAYS_TEXT.search(function) is not None


def _succeeds(function: str) -> bool:
    """Whether the function runs when the plugin is loaded, where an error would end the process."""
    return function.startswith("__hip")


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
