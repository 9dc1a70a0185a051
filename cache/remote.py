"""Remote tiers: artifacts that CI hosts have pushed, read through on a miss and checked in full before they are kept.

    <url>/v1/index/<key>.json   what a key names, with its factors and signatures
    <url>/v1/blobs/<id>         artifacts by content

Nothing is written there but by `max cache push`. A remote that does not answer is one warning and a miss.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import msgspec

from .. import CacheError, ConfigError
from .catalog import Entry
from .exported import ExportedArtifact, describe
from .key import Key, explain
from .mef import Mef
from .record import MAX_RECORD_BYTES, Digest, decode, encode
from .trust import Trust, distrust_of

if TYPE_CHECKING:
    from .store import Store

log = logging.getLogger(__name__)

_LAYOUT = "v1"
_PIECE_BYTES = 4 << 20
_CLIENT = {"connect_timeout": "5s", "timeout": "600s"}
_RETRY = {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}


class RemoteRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a remote says of one key."""

    key: Digest
    artifact: ExportedArtifact
    created: float
    """Seconds since the epoch, by the clock of who pushed it."""


class Remote:
    """A place of artifacts behind an URL."""

    def __init__(self, url: str, trust: Trust) -> None:
        """Raises: ConfigError for an URL that means nothing. Nothing is asked of the remote yet."""
        self.url, self.trust = url.rstrip("/"), trust
        self._store = _object_store(self.url)

    def fetch(self, key: Key, store: "Store") -> Mef | None:
        """Returns a key's artifact, kept in the store where it can be; None where the remote has none.

        Raises: CacheError for an artifact that is damaged, unsigned (where that matters) or another one, and for a
        remote that cannot be asked.
        """
        record = self._record(key.digest)
        if record is None:
            return None
        row = record.artifact
        if row.key != key.digest or explain(key.factors, row.factors):
            raise CacheError(f"{self.url} has another artifact under {key}", "it is compiled here instead")
        self._check_signed(row)
        if not store.writable:
            data = b"".join(self._blob(row))
            mef = Mef.from_bytes(data)
            _check(mef, row.mef, self.url)
            return mef
        with store.temporary(".mef") as path:
            _write(path, self._blob(row))
            return store.adopt(key, row.mef, path, row.signatures, command=f"fetched from {self.url}")

    def push(self, store: "Store", entry: Entry) -> bool:
        """Writes an entry and its signatures there; returns False where the remote has the artifact already.

        Raises: CacheError for a damaged artifact and for a remote that cannot be written.
        """
        path = store.blob_path(entry.record.mef)
        mef = Mef.open(path)
        mef.check()
        row = describe(entry.key, mef, store.signed(entry.record.key, mef.id))
        there = self._record(entry.record.key)
        if there is not None and there.artifact == row:
            return False
        record = RemoteRecord(key=entry.record.key, artifact=row, created=time.time())
        with _translated(self.url):
            import obstore

            # The record is written last, so that what it names is there.
            obstore.put(self._store, f"{_LAYOUT}/blobs/{row.mef}", path)
            obstore.put(self._store, f"{_LAYOUT}/index/{row.key}.json", encode(record))
        return True

    def pull(self, store: "Store", digest: str) -> ExportedArtifact:
        """Keeps the artifact of a key in the store. Raises: ConfigError when there is none; CacheError as `fetch`."""
        record = self._record(digest)
        if record is None:
            raise ConfigError(f"{self.url} has no artifact {digest}", "`max cache pull` without a name takes all.")
        row = record.artifact
        if self.fetch(Key(row.key, row.factors), store) is None:
            raise CacheError(f"{self.url} lost {digest} meanwhile", "try again")
        return row

    def keys(self) -> Iterator[str]:
        """Yields the keys there are, in no order. Raises: ConfigError for http, which has no listings; CacheError."""
        if self.url.startswith("http"):
            raise ConfigError(f"{self.url} cannot be listed", "Name the keys to pull in full.")
        with _translated(self.url):
            import obstore

            for chunk in obstore.list(self._store, prefix=f"{_LAYOUT}/index"):
                yield from (Path(each["path"]).stem for each in chunk)

    def _record(self, digest: str) -> RemoteRecord | None:
        place = f"{_LAYOUT}/index/{digest}.json"
        data = bytearray()
        for piece in self._read(place, MAX_RECORD_BYTES):
            data += piece
        return decode(bytes(data), RemoteRecord, f"{self.url}/{place}") if data else None

    def _blob(self, row: ExportedArtifact) -> Iterator[bytes]:
        found = 0
        for piece in self._read(f"{_LAYOUT}/blobs/{row.mef}", row.bytes):
            found += len(piece)
            yield piece
        if found != row.bytes:
            raise CacheError(f"{self.url} has {found} of {row.bytes} bytes of {row.mef[:12]}", "it is compiled here")

    def _read(self, place: str, limit: int) -> Iterator[bytes]:
        """Yields what lies at a place, nothing where there is none. Raises: CacheError, also for more than `limit`."""
        with _translated(self.url):
            import obstore

            try:
                result = obstore.get(self._store, place)
            except FileNotFoundError:
                return
            read = 0
            for piece in result.stream(_PIECE_BYTES):
                read += len(piece)
                if read > limit:
                    raise CacheError(f"{self.url}/{place} is longer than {limit} bytes", "it is compiled here")
                yield bytes(piece)

    def _check_signed(self, row: ExportedArtifact) -> None:
        why = _distrust(self.url) or ("signatures are required" if self.trust.required else "")
        if why and not self.trust.signers(row.key, row.mef, row.signatures):
            raise CacheError(
                f"{self.url} has an artifact without a signature of a key in {self.trust.keys_file}, and {why}",
                "sign it before it is pushed; it is compiled here instead",
            )


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turns errors of the object store and of the network into CacheErrors that name the remote."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        hint = "check the address, the network and the credentials"
        raise CacheError(f"the remote {url} cannot be used: {lines[0][:200]}", hint) from error


def _object_store(url: str) -> Any:
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    scheme = urlsplit(url).scheme
    settings: dict[str, Any] = {}
    if scheme != "file":
        # The object store reads the variable itself only where no options are given.
        named = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
        plain = scheme == "http" or any(os.environ.get(name, "").lower() in ("true", "1") for name in named)
        client: dict[str, Any] = {**_CLIENT, **({"allow_http": True} if plain else {})}
        settings = {"client_options": client, "retry_config": _RETRY}
    try:
        return from_url(url, **settings)
    except (BaseError, ValueError, TypeError) as error:
        why = str(error).splitlines()[0][:200]
        raise ConfigError(f"{url} cannot be a remote: {why}", "Check the address.") from error


def _distrust(url: str) -> str:
    """Why others may have put artifacts there, "" where the address stands for a trusted place."""
    parts = urlsplit(url)
    if parts.scheme == "http":
        return "http is open to changes on the way"
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        try:
            return distrust_of(folder)
        except OSError as error:
            return f"{folder} cannot be looked at: {os.strerror(error.errno or 0)}"
    return ""


def _write(path: Path, pieces: Iterator[bytes]) -> None:
    try:
        with open(path, "xb") as file:
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error.strerror}", "free some space") from error


def _check(mef: Mef, expected: str, origin: str) -> None:
    if mef.id != expected:
        raise CacheError(f"{origin} has the artifact {mef.id[:12]} in place of {expected[:12]}", "it is compiled here")
    mef.check()
