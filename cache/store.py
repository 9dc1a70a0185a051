"""The store of compiled artifacts, bindings and prepared weights: one folder, any number of processes, no locks.

index/<key>.json       which artifact a key names; written last, so that its presence means complete
blobs/xx/<id>          artifacts by content
signatures/<key>.json  who vouches for an artifact
verdicts/<name>.json   whether an artifact was found sound on a kind of machine
bindings/<name>.json   which artifact and prepared weights serve a checkpoint
prepared/xx/<id>       prepared weights
derived/<name>         what is read out of a checkpoint once: converted tokenizers, headers
pins/<key>             artifacts that eviction spares
tmp/ leases/ quarantine/ VERSION
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import CacheError, ConfigError
from .catalog import nearest, records
from .checkpoint_store import CheckpointStore
from .evidence_store import EvidenceStore
from .folder import move_into_place, read_small, write_small
from .key import Key, explain
from .lease import WAIT_LIMIT_S, Lease, Waiting
from .mef import Mef
from .record import ActionRecord, decode, encode
from .signing import SignatureRecord, unsigned
from .trust import is_foreign_file

log = logging.getLogger(__name__)

Kind = Literal["exact", "compatible", "remote", "precompiled"]


@dataclass(frozen=True)
class Found:
    """An artifact, the key that it is stored under, and how it was come by."""

    mef: Mef
    key: Key
    kind: Kind


class Store(CheckpointStore, EvidenceStore):
    """Artifacts by key. A miss is None, and so is everything that cannot be had or kept; `open` makes a store."""

    def lookup(self, key: Key) -> Mef | None:
        """Returns the artifact of exactly this key as `find` does."""
        found = self.find(key)
        return None if found is None else found.mef

    def find(self, key: Key, serves: Callable[[dict[str, Any]], bool] | None = None) -> Found | None:
        """Returns an artifact for a key, its header and table checked, or None; each is counted.

        serves: tells by its factors whether an artifact of another key does as well, such as one compiled for fewer
                instruction sets; asked when there is none of the key itself
        Raises: ConfigError on a miss under the policy `require` or among --precompiled-mefs, naming what differs from
        the nearest artifact.
        """
        with self._timed():
            if self.precompiled:
                return self._hit(self._precompiled(key, serves))
            found = self._find(key)
            if isinstance(found, Mef):
                return self._hit(Found(found, key, "exact"))
            other = self._from_remote(key) or (self.search(serves) if serves else None)
        if other is not None:
            return self._hit(other)
        self.counters.misses[found] += 1
        log.info("cache miss key=%s reason=%s", key, found)
        if self.policy == "require":
            raise self._required(key, found)
        return None

    def peek(self, key: Key) -> Mef | None:
        """Returns what `lookup` would, uncounted and without what a policy demands."""
        found = self._find(key)
        return found if isinstance(found, Mef) else None

    def _hit(self, found: Found) -> Found:
        self._in_use.add(found.key.digest)
        self.counters.hits[found.kind] += 1
        self.counters.bytes_read += found.mef.size
        log.info("cache hit key=%s kind=%s bytes=%d", found.key, found.kind, found.mef.size)
        return found

    def _precompiled(self, key: Key, serves: Callable[[dict[str, Any]], bool] | None) -> Found:
        from .exported import find_precompiled

        found = find_precompiled(self.precompiled, key, self.trust, serves)
        self._elsewhere[found.mef.id] = found.path
        return Found(found.mef, found.key, "precompiled")

    def _from_remote(self, key: Key) -> Found | None:
        """Asks the remote; trouble with it is a warning and a miss."""
        if self.remote_url is None or self.policy in ("off", "redo"):
            return None
        from .remote import Remote

        try:
            mef = Remote(self.remote_url, self.trust).fetch(key, self)
        except CacheError as error:
            self._warn("remote", f"going on without the remote: {error.message}; {error.hint}")
            return None
        if mef is None:
            return None
        self.counters.bytes_fetched += mef.size
        return Found(mef, key, "remote")

    def search(self, serves: Callable[[dict[str, Any]], bool]) -> Found | None:
        """Returns the most recently used artifact whose factors `serves` accepts, uncounted; None where none does."""
        for _, record in records(self):
            if serves(record.factors):
                other = Key(record.key, record.factors)
                found = self._find(other)
                if isinstance(found, Mef):
                    return Found(found, other, "compatible")
        return None

    def publish(
        self,
        key: Key,
        write: Callable[[Path], object] | bytes,
        *,
        command: str = "",
        seconds: float = 0.0,
        made_here: bool = True,
    ) -> Mef | None:
        """Keeps an artifact under a key and returns it opened; None, with one warning, where it cannot be kept.

        write: the artifact's bytes, or a function that writes them to a path
        command, seconds: how it was made and how long that took, for `max cache`
        made_here: whether the key of --sign-with vouches for it
        """
        if not self.writable:
            return None
        try:
            with self._timed(), self.temporary(".mef") as path:
                path.write_bytes(write) if isinstance(write, bytes) else write(path)
                mef = Mef.open(path)
                move_into_place(path, self._path("blobs", mef.id))
                mef = Mef.open(self._path("blobs", mef.id))
                record = ActionRecord(
                    key=key.digest,
                    factors=key.factors,
                    mef=mef.id,
                    bytes=mef.size,
                    created=time.time(),
                    command=command,
                    seconds=seconds,
                )
                if made_here:
                    self.signed(key.digest, mef.id)
                write_small(self._path("index", key.digest), encode(record), self.root / "tmp")
        except (OSError, CacheError) as error:
            self.not_kept("artifact", error)
            return None
        self.counters.bytes_written += mef.size
        self._in_use.add(key.digest)
        self._published.add(mef.id)
        self.evict()
        return mef

    def adopt(self, key: Key, expected: str, path: Path, signatures: SignatureRecord | None, *, command: str) -> Mef:
        """Keeps an artifact that has come from elsewhere, in a file from `temporary`, once all of it has been checked.

        expected: its id
        signatures: kept beside it; whoever trusts their keys may use it
        Raises: CacheError when it is damaged or another one, or cannot be kept.
        """
        mef = Mef.open(path)
        if mef.id != expected:
            raise CacheError(f"it is the artifact {mef.id[:12]} and not {expected[:12]}", "it is compiled here instead")
        mef.check()
        kept = self.publish(key, lambda target: os.replace(path, target), command=command, made_here=False)
        if kept is None:
            raise CacheError(f"it cannot be kept in {self.root}", "`max cache doctor` says why")
        if signatures is not None:
            self.add_signatures(signatures)
        return kept

    def artifact_path(self, artifact: Mef) -> Path | None:
        """Returns the file of an artifact, or None where it is not kept."""
        if artifact.id in self._elsewhere:
            return self._elsewhere[artifact.id]
        path = self._path("blobs", artifact.id)
        return path if self.readable and path.is_file() else None

    def blob_path(self, mef: str) -> Path:
        """Where the artifact of that id lies, if it is there. Raises: CacheError for a name that is no id."""
        return self._path("blobs", mef)

    def lease(
        self, key: Key, *, on_wait: Callable[[Waiting], None] | None = None, limit_s: float = WAIT_LIMIT_S
    ) -> AbstractContextManager[Lease[Mef]]:
        """Makes one process at a time the maker of a key's artifact: compile inside, unless `found` is there already.

        on_wait: called about once a second while another process compiles
        limit_s: after so long a wait the caller compiles for itself
        """

        def find() -> Mef | None:
            found = self._find(key)
            return found if isinstance(found, Mef) else None

        return self.lease_named(key.digest, find, on_wait=on_wait, limit_s=limit_s)

    def quarantine(self, key: Key, error: CacheError) -> None:
        """Sets an artifact aside that turned out to be damaged when a section was read, so that it is made again."""
        index = self._path("index", key.digest)
        with contextlib.suppress(OSError, CacheError):
            record = decode(read_small(index), ActionRecord, index)
            self._set_aside(error, index, self._path("blobs", record.mef))

    def pin(self, key: Key, pinned: bool = True) -> None:
        """Has eviction spare an artifact and the prepared weights bound to it, or no longer. Raises: CacheError."""
        path = self._path("pins", key.digest)
        try:
            path.touch() if pinned else path.unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(f"{path} cannot be changed: {error.strerror}", "is the cache read-only?") from error

    def _find(self, key: Key) -> Mef | str:
        """Returns the artifact, or in a word why there is none."""
        if not self.readable:
            return "off" if self.policy == "off" else "no cache"
        index = self._path("index", key.digest)
        if index in self._unusable:
            return "damaged"
        try:
            record = decode(read_small(index), ActionRecord, index)
            if record.key != key.digest or explain(key.factors, record.factors):
                raise CacheError(f"{index} describes another artifact", "it will be made again")
        except FileNotFoundError:
            return "absent"
        except OSError as error:
            self._warn("read", f"{index} cannot be read: {error.strerror}")
            return "unreadable"
        except CacheError as error:
            self._set_aside(error, index)
            return "damaged"
        if self._is_outdated(record.created):
            return "redo"
        if not self._is_trusted(index, record):
            return "unsigned"
        return self._open_blob(index, record)

    def _is_trusted(self, index: Path, record: ActionRecord) -> bool:
        """Whether an artifact may be run: its files are this user's and no signature is required, or it is signed."""
        blob = self._path("blobs", record.mef)
        private = self.is_private and not is_foreign_file(index) and not is_foreign_file(blob)
        if record.mef in self._published or (private and not self.trust.required):
            return True
        if self.trust.signers(record.key, record.mef, self.signatures(record.key)):
            return True
        error = unsigned(f"the artifact {record.mef[:12]} in {self.root}", self.trust.keys_file)
        self._warn("unsigned", f"{error.message}, and is not used; {error.hint}")
        return False

    def _open_blob(self, index: Path, record: ActionRecord) -> Mef | str:
        blob = self._path("blobs", record.mef)
        try:
            mef = Mef.open(blob)
            if mef.id != record.mef:
                raise CacheError(f"{blob} is the artifact {mef.id}", "it will be made again")
        except CacheError as error:
            if not isinstance(error.__cause__, OSError):
                self._set_aside(error, index, blob)
                return "damaged"
            if isinstance(error.__cause__, FileNotFoundError):
                if not index.exists():  # evicted since it was read
                    return "absent"
                self._set_aside(error, index)
                return "incomplete"
            self._warn("read", error.message)
            return "unreadable"
        self._touch(index)
        return mef

    def _required(self, key: Key, reason: str) -> ConfigError:
        message = f"no compiled artifact for these settings in {self.root} ({reason}), and --cache-policy is require"
        near = nearest(self, key)
        if near is None:
            return ConfigError(message, "run `max warm-cache` with the same options and the same --cache-dir first")
        first, *others = near[1]
        more = f" (and {len(others)} more: {', '.join(other.path for other in others[:5])})" if others else ""
        hint = f"the nearest one differs in {first}{more}; run `max warm-cache` with these options"
        return ConfigError(message, hint)
