"""What the store keeps of a checkpoint: its binding, its prepared weights, and what takes long to read out of it."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from .. import CacheError
from .binding import Binding
from .folder import move_into_place, read_small, retrying, write_small
from .open_folder import OpenFolder

_DIGEST_BYTES = hashlib.sha256().digest_size


class CheckpointStore(OpenFolder):
    """Bindings, prepared weights and derived files. Those of another user are passed over: nobody signs them."""

    def lookup_binding(self, digest: str) -> Binding | None:
        """Returns the binding of that name, or None; a damaged one is quarantined."""
        path = self._path("bindings", digest)
        if not self.readable or not self._is_mine(path):
            return None
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
        paths: list[Path] = []
        if self.readable:
            with contextlib.suppress(OSError):
                paths = [Path(entry.path) for entry in os.scandir(self.root / "bindings")]
        for path in filter(self._is_mine, paths):
            with contextlib.suppress(OSError, CacheError):
                binding = Binding.decoded(read_small(path), path)
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
        if not self.readable or path in self._unusable or not path.is_file() or not self._is_mine(path):
            return None
        self._in_use.add(identity)
        self._touch(path)
        return path

    def prepared_file(self, identity: str) -> Path:
        """Where prepared weights of that id lie, if they are there. Raises: CacheError for a name that is no id."""
        return self._path("prepared", identity)

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

    def quarantine_prepared(self, identity: str, error: CacheError) -> None:
        """Sets damaged prepared weights aside, so that they are made again."""
        self._set_aside(error, self._path("prepared", identity))

    def lookup_derived(self, name: str) -> bytes | None:
        """Returns what was derived from a checkpoint under this name, its hash compared; None when there is none.

        A damaged one, or one of another name, is quarantined.
        """
        path = self._path("derived", name)
        if not self.readable or path in self._unusable or not self._is_mine(path):
            return None
        try:
            with self._timed():
                made, content = path.stat().st_mtime, retrying(path.read_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("read", f"{path} cannot be read: {error.strerror}")
            return None
        digest, derived = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != _digest(name, derived):
            self.quarantine_derived(name, CacheError(f"{path} is damaged", "it will be made again"))
            return None
        self._touch(path)
        return None if self._is_outdated(made) else derived

    def publish_derived(self, name: str, derived: bytes, what: str) -> bool:
        """Keeps it under the name of what it was made from; returns False, with one warning, if it cannot.

        what: it is, for the warning
        """
        if not self.writable:
            return False
        try:
            with self._timed():
                write_small(self._path("derived", name), _digest(name, derived) + derived, self.root / "tmp")
        except OSError as error:
            self.not_kept(what, error)
            return False
        return True

    def quarantine_derived(self, name: str, error: CacheError) -> None:
        """Sets a derived file that cannot be used aside, so that it is made again."""
        self._set_aside(error, self._path("derived", name))


def _digest(name: str, derived: bytes) -> bytes:
    """Over the name too, so that one file is never taken for another."""
    return hashlib.sha256(name.encode() + derived).digest()
