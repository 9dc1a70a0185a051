"""The store of compiled artifacts, bindings and prepared weights: one folder, any number of processes, no locks.

index/<key>.json      which artifact a key names; written last, so that its presence means complete
blobs/xx/<id>         artifacts by content
bindings/<name>.json  which artifact and prepared weights serve a checkpoint
prepared/xx/<id>      prepared weights
pins/<key>            artifacts that eviction spares
tmp/ leases/ quarantine/ VERSION
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from .. import CacheError, ConfigError
from .binding import Binding
from .eviction import Evicted, evict
from .folder import move_into_place, read_small, write_small
from .key import Difference, Key, explain
from .lease import WAIT_LIMIT_S, Lease, Waiting, single_flight
from .mef import Mef
from .open_folder import OpenFolder
from .record import ActionRecord, decode, encode

log = logging.getLogger(__name__)

_NEAREST_OF = 500


class Store(OpenFolder):
    """Artifacts by key. A miss is None, and so is everything that cannot be had or kept; `open` makes a store."""

    def lookup(self, key: Key) -> Mef | None:
        """Returns the artifact of a key, its header and table checked, or None; each is counted.

        Raises: ConfigError on a miss under the policy `require`, naming what differs from the nearest artifact.
        """
        with self._timed():
            found = self._find(key)
        if isinstance(found, Mef):
            self._in_use.add(key.digest)
            self.counters.hits += 1
            self.counters.bytes_read += found.size
            log.info("cache hit key=%s bytes=%d", key, found.size)
            return found
        self.counters.misses[found] += 1
        log.info("cache miss key=%s reason=%s", key, found)
        if self.policy == "require":
            raise self._required(key, found)
        return None

    def publish(
        self, key: Key, write: Callable[[Path], object] | bytes, *, command: str = "", seconds: float = 0.0
    ) -> Mef | None:
        """Keeps an artifact under a key and returns it opened; None, with one warning, where it cannot be kept.

        write: the artifact's bytes, or a function that writes them to a path
        command, seconds: how it was made and how long that took, for `max cache`
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
                write_small(self._path("index", key.digest), encode(record), self.root / "tmp")
        except (OSError, CacheError) as error:
            self.not_kept("artifact", error)
            return None
        self.counters.bytes_written += mef.size
        self._in_use.add(key.digest)
        self.evict()
        return mef

    def artifact_path(self, artifact: Mef) -> Path | None:
        """Returns the file of an artifact, or None where it is not kept."""
        path = self._path("blobs", artifact.id)
        return path if self.readable and path.is_file() else None

    def lookup_binding(self, digest: str) -> Binding | None:
        """Returns the binding of that name, or None; a damaged one is quarantined."""
        if not self.readable:
            return None
        path = self._path("bindings", digest)
        try:
            with self._timed():
                binding = Binding.decoded(read_small(path), path)
            if binding.digest != digest:
                raise CacheError(f"{path} is the binding {binding.digest}", "it will be made again")
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("read", f"{path} cannot be read: {error.strerror}")
            return None
        except CacheError as error:
            self._set_aside(error, path)
            return None
        self._touch(path)
        return None if self._is_outdated(binding.created) else binding

    def bindings(self) -> Iterator[Binding]:
        """Yields every readable binding that the policy does not pass over, in no order."""
        paths: list[str] = []
        if self.readable:
            with contextlib.suppress(OSError):
                paths = [entry.path for entry in os.scandir(self.root / "bindings")]
        for path in paths:
            with contextlib.suppress(OSError, CacheError):
                binding = Binding.decoded(read_small(Path(path)), path)
                if not self._is_outdated(binding.created):
                    yield binding

    def publish_binding(self, binding: Binding) -> bool:
        """Keeps a binding under its digest; returns False, with one warning, where it cannot be kept."""
        if not self.writable:
            return False
        try:
            with self._timed():
                write_small(self._path("bindings", binding.digest), binding.encoded(), self.root / "tmp")
        except OSError as error:
            self.not_kept("binding", error)
            return False
        return True

    def prepared_path(self, identity: str) -> Path | None:
        """Returns the file of prepared weights with that id, and notes its use; None when there is none.

        Under the policy `redo` it is found through a binding made since the start only, as those are.
        """
        path = self._path("prepared", identity)
        if not self.readable or path in self._unusable or not path.is_file():
            return None
        self._in_use.add(identity)
        self._touch(path)
        return path

    def publish_prepared(self, temporary: Path, identity: str) -> Path | None:
        """Moves prepared weights, written to a path from `temporary`, into the store and returns their place.

        Returns None, with one warning, where they cannot be kept; the temporary file is still there then.
        """
        if not self.writable:
            return None
        path = self._path("prepared", identity)
        try:
            with self._timed():
                size = temporary.stat().st_size
                move_into_place(temporary, path)
        except OSError as error:
            self.not_kept("file of prepared weights", error)
            return None
        self.counters.bytes_written += size
        self._in_use.add(identity)
        self.evict()
        return path

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

    def lease_named[T](
        self,
        name: str,
        find: Callable[[], T | None],
        *,
        on_wait: Callable[[Waiting], None] | None = None,
        limit_s: float = WAIT_LIMIT_S,
    ) -> AbstractContextManager[Lease[T]]:
        """Does what `lease` does for anything that `find` finds once it is made, such as prepared weights.

        name: a digest that stands for the work
        """
        if not self.writable:
            return contextlib.nullcontext(Lease[T](None, False, 0.0))
        path = self._path("leases", name)
        return single_flight(path.parent, path.name, find, on_wait=on_wait, limit_s=limit_s)

    def records(self) -> list[ActionRecord]:
        """Returns the readable index entries, the most recently used first."""
        dated: list[tuple[float, Path]] = []
        if self.readable:
            with contextlib.suppress(OSError):
                dated = [(entry.stat().st_mtime, Path(entry.path)) for entry in os.scandir(self.root / "index")]
        found = []
        for _, path in sorted(dated, reverse=True):
            with contextlib.suppress(OSError, CacheError):
                found.append(decode(read_small(path), ActionRecord, path))
        return found

    def nearest(self, key: Key) -> tuple[ActionRecord, list[Difference]] | None:
        """Returns the stored record that differs from a key in the fewest factors, and those: why it is a miss."""
        ranked = [(record, explain(key.factors, record.factors)) for record in self.records()[:_NEAREST_OF]]
        return min((pair for pair in ranked if pair[1]), key=lambda pair: len(pair[1]), default=None)

    def quarantine(self, key: Key, error: CacheError) -> None:
        """Sets an artifact aside that turned out to be damaged when a section was read, so that it is made again."""
        index = self._path("index", key.digest)
        with contextlib.suppress(OSError, CacheError):
            record = decode(read_small(index), ActionRecord, index)
            self._set_aside(error, index, self._path("blobs", record.mef))

    def quarantine_prepared(self, identity: str, error: CacheError) -> None:
        """Sets damaged prepared weights aside, so that they are made again."""
        self._set_aside(error, self._path("prepared", identity))

    def pin(self, key: Key, pinned: bool = True) -> None:
        """Has eviction spare an artifact and the prepared weights bound to it, or no longer. Raises: CacheError."""
        path = self._path("pins", key.digest)
        try:
            path.touch() if pinned else path.unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(f"{path} cannot be changed: {error.strerror}", "is the cache read-only?") from error

    def evict(self) -> Evicted:
        """Brings the store under its size, and removes what crashed processes left behind.

        What this process has found or made stays whatever the size: a model needs its artifact and its weights.
        """
        if not self.writable:
            return Evicted(0, 0)
        with self._timed():
            evicted = evict(self.root, self.max_bytes, self._in_use)
        if evicted.files:
            log.info("cache evicted files=%d bytes=%d", evicted.files, evicted.bytes)
        return evicted

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
        return self._open_blob(index, record)

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
        nearest = self.nearest(key)
        if nearest is None:
            return ConfigError(message, "run `max warm-cache` with the same options and the same --cache-dir first")
        first, *others = nearest[1]
        more = f" (and {len(others)} more: {', '.join(other.path for other in others[:5])})" if others else ""
        return ConfigError(
            message, f"the nearest one differs in {first}{more}; run `max warm-cache` with these options"
        )
