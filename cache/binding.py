"""A binding ties one checkpoint to the artifact and the prepared weights that serve it; a warm start begins with it.

Artifacts hold no checkpoint's identity, so all fine-tunes of one shape share one; what differs between them is here.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec

from .. import CacheError
from .key import make_key
from .record import Digest, Sha256, decode, encode


class CheckpointFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the checkpoint as it was when the binding was made."""

    name: str
    bytes: int
    mtime_ns: int


class CheckpointIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tells a checkpoint from another or from a changed one, without reading its weights."""

    path: str
    files: tuple[CheckpointFile, ...]
    sha256: Sha256
    """Over the tensor headers and config.json."""


class BoundFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tokenizer or template file, by content."""

    path: str
    sha256: Sha256

    @classmethod
    def of(cls, path: Path) -> Self:
        """Hashes a file. Raises: OSError when it cannot be read."""
        with path.open("rb") as file:
            return cls(str(path), hashlib.file_digest(file, "sha256").hexdigest())


class Binding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a warm start needs to know of a checkpoint besides the artifact itself."""

    format: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    digest: Digest
    """The binding's own name, from `binding_digest`."""
    key: Digest
    """The key of the artifact."""
    factors: dict[str, Any]
    """The factors of that key."""
    checkpoint: CheckpointIdentity
    mef: Sha256
    prepared: Sha256
    files: tuple[BoundFile, ...]
    stop_token_ids: tuple[int, ...]
    generation: dict[str, Any]
    """The checkpoint's own sampling defaults."""
    max_length: Annotated[int, msgspec.Meta(ge=1)]
    """Tokens of prompt and completion together."""
    architecture: str
    created: float
    """Seconds since the epoch."""
    versions: dict[str, str]

    def changed_files(self) -> list[str]:
        """Returns the tokenizer and template files whose content is no longer what was bound, or that are gone."""
        return [file.path for file in self.files if not _unchanged(file)]

    def encoded(self) -> bytes:
        """Returns the binding as canonical JSON."""
        return encode(self)

    @classmethod
    def decoded(cls, data: bytes, origin: object = "the binding") -> Self:
        """Reads a binding. Raises: CacheError, naming `origin`, when it is damaged or names another key's factors."""
        binding = decode(data, cls, origin)
        if make_key(binding.factors).digest != binding.key:
            raise CacheError(f"{origin} is damaged: its factors do not give its key", "it will be made again")
        return binding


def _unchanged(file: BoundFile) -> bool:
    try:
        return BoundFile.of(Path(file.path)) == file
    except OSError:
        return False


def checkpoint_identity(identity: dict[str, Any]) -> CheckpointIdentity:
    """Returns the typed form of a checkpoint's identity. Raises: CacheError when it has another shape."""
    try:
        return msgspec.convert(identity, CheckpointIdentity)
    except msgspec.ValidationError as error:
        raise CacheError(f"a checkpoint cannot be bound: {error}", "no binding is kept for it") from error


def binding_digest(checkpoint: dict[str, Any], settings: dict[str, Any]) -> str:
    """Returns the name of a binding: one checkpoint under one set of everything else that decides its artifact.

    `settings` are known before the model's config is parsed, so that a warm start finds its binding at once.
    """
    return make_key({"checkpoint": checkpoint, "settings": settings}).digest
