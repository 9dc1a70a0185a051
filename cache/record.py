"""Small JSON records on disk: strict when they are read, so that a damaged one is a CacheError and nothing else."""

from typing import Annotated, Any

import msgspec
import xxhash

from .. import CacheError
from .canonical import canonical_json

Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
"""An xxh3-128 in hex: the name of a key or of a binding."""

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""A sha256 in hex: the id of an artifact or of prepared weights."""

MAX_RECORD_BYTES = 16 << 20
_SEALED = b'{"check":"%s","record":%s}'


class ActionRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the index says of one key: which artifact it names, and how that was made. Its presence means complete."""

    format: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    key: Digest
    factors: dict[str, Any]
    mef: Sha256
    bytes: int
    created: float
    """Seconds since the epoch."""
    command: str
    seconds: float
    """What making the artifact took."""


def encode(record: msgspec.Struct) -> bytes:
    """Returns a record as JSON with a check value. Raises: TypeError when it holds what JSON cannot."""
    return seal(canonical_json(msgspec.to_builtins(record)))


def seal(body: bytes) -> bytes:
    """Wraps JSON in an object with the xxh3-128 of its bytes, since a flipped digit is valid JSON too."""
    return _SEALED % (xxhash.xxh3_128_hexdigest(body).encode(), body)


def decode[T: msgspec.Struct](data: bytes, record_type: type[T], origin: object) -> T:
    """Reads a record. Raises: CacheError, naming `origin`, for anything that is not exactly such a record."""
    hint = "it will be made again; delete the file if this message comes back"
    body = data[len(_SEALED % (bytes(32), b"")) - 1 : -1]
    if len(data) > MAX_RECORD_BYTES or seal(body) != data:
        raise CacheError(f"{origin} is damaged: its check value is not that of its content", hint)
    try:
        return msgspec.json.decode(body, type=record_type)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CacheError(f"{origin} is damaged: {error}", hint) from error
