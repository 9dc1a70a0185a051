"""What the compile process and its parent say to each other: length-prefixed msgpack over two pipes."""

from __future__ import annotations

import struct
from typing import BinaryIO

import msgspec

_LENGTH = struct.Struct("<Q")


class Start(msgspec.Struct, frozen=True):
    """The first message: what is compiled for, with how many threads, and whether the device itself is to take part."""

    target: str
    threads: int
    on_device: bool = False


class Job(msgspec.Struct, frozen=True):
    """One module to compile, with XLA's options for it; `dump_to` is a folder for XLA's own dumps."""

    name: str
    module: bytes
    options: dict[str, str | bool | int]
    dump_to: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """What became of a job; of the start itself where `name` is empty. `error` is a message and a hint."""

    name: str
    error: tuple[str, str] | None = None
    executable: bytes = b""
    flops: float = 0.0
    bytes_accessed: float = 0.0
    memory: dict[str, int] = {}
    optimized_hlo: str = ""
    seconds: float = 0.0


def send(pipe: BinaryIO, message: msgspec.Struct) -> None:
    """Writes one message."""
    data = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def receive[T](pipe: BinaryIO, type: type[T]) -> T | None:
    """Reads one message; None where the other side has gone, in the middle of a message too."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = pipe.read(length)
    return msgspec.msgpack.decode(data, type=type) if len(data) == length else None
