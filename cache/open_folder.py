"""The cache folder as one process may use it: whether it can be read and written, and what went wrong with it so far.

Trouble is said once for each kind and counted; it never stops the caller.
"""

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .. import CacheError
from .bounds import Bounds
from .counters import Counters
from .eviction import Evicted, evict
from .folder import Untrusted, open_root, unused_name
from .lease import WAIT_LIMIT_S, Lease, Waiting, single_flight
from .signing import read_key
from .trust import Trust, is_foreign_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from .config import CacheConfig, CachePolicy

log = logging.getLogger(__name__)

# As with relatime: use is not noted again so soon, for the sake of network file systems.
TOUCH_AFTER_S = 600.0
_NAME = re.compile(r"[0-9a-f]{32}([0-9a-f]{32})?")


class OpenFolder:
    """A cache folder that was found usable for reading, for writing, or for neither."""

    def __init__(self, root: Path, policy: "CachePolicy", bounds: Bounds, trust: Trust) -> None:
        self.root = root
        self.policy = policy
        self.bounds = bounds
        self.trust = trust
        self.is_private = True
        """Whether nobody else can have put files here; otherwise signed artifacts are used, and nothing is kept."""
        self.signing_key: Ed25519PrivateKey | None = None
        """What signs the artifacts that are made here or sent elsewhere; None where nobody signs."""
        self.remote_url: str | None = None
        self.export_folder: Path | None = None
        self.precompiled: tuple[Path, ...] = ()
        self.readable = False
        self.writable = False
        self.counters = Counters()
        self._opened = time.time()
        self._warned: set[str] = set()
        self._unusable: set[Path] = set()
        self._in_use: set[str] = set()
        self._published: set[str] = set()
        self._elsewhere: dict[str, Path] = {}

    @classmethod
    def open(cls, config: "CacheConfig") -> Self:
        """Opens the configured folder, and makes it if need be: an unusable folder is one warning and no failure.

        Raises: ConfigError for keys that were named and cannot be used, before anything is made or believed.
        """
        opened = cls(config.folder, config.cache_policy, Bounds.of(config), Trust.of(config))
        opened.trust.check_named()
        if config.sign_with is not None:
            opened.signing_key = read_key(config.sign_with.expanduser())
        opened.remote_url = config.cache_remote
        opened.export_folder, opened.precompiled = config.export_mefs, config.precompiled_mefs
        if opened.policy != "off":
            opened._open_root(fills=opened.policy in ("on", "redo"))
        return opened

    def _open_root(self, fills: bool) -> None:
        try:
            writable = open_root(self.root, create=fills)
        except FileNotFoundError as error:
            if fills:
                self._warn("open", f"the cache folder {self.root} cannot be made: {error.strerror}")
        except OSError as error:
            self._warn("open", f"the cache folder {self.root} cannot be used: {error.strerror}")
        except Untrusted as error:
            self._open_untrusted(error)
        except CacheError as error:
            self._warn("open", f"going on without a cache: {error.message}; {error.hint}")
        else:
            self.readable = True
            self.writable = writable and self.policy != "readonly"
            if fills and not writable:
                self._warn("open", f"the cache folder {self.root} is read-only: what it lacks is made and not kept")

    def _open_untrusted(self, error: Untrusted) -> None:
        if not self.trust.keys:
            self._warn("open", f"going on without a cache: {error.message}; {error.hint}")
            return
        try:
            open_root(self.root, create=False, private=False)
        except (OSError, CacheError) as other:
            self._warn("open", f"the cache folder {self.root} cannot be used: {other}")
            return
        self.readable, self.is_private = True, False
        self._warn("open", f"{error.message}: only signed artifacts are used, and nothing is kept there")

    def _is_mine(self, path: Path) -> bool:
        """Whether a record or prepared weights can be believed: nobody else has put them here."""
        return self.is_private and not is_foreign_file(path)

    @contextlib.contextmanager
    def temporary(self, suffix: str = "") -> Iterator[Path]:
        """Yields an unused path on the folder's file system; what is left there at the end is removed.

        Raises: CacheError where the folder cannot be written, as `writable` says.
        """
        if not self.writable:
            raise CacheError(f"nothing can be written to the cache in {self.root}", "choose another --cache-dir")
        path = unused_name(self.root / "tmp", suffix)
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def lease_named[T](
        self,
        name: str,
        find: Callable[[], T | None],
        *,
        on_wait: Callable[[Waiting], None] | None = None,
        limit_s: float = WAIT_LIMIT_S,
    ) -> AbstractContextManager[Lease[T]]:
        """Makes one process at a time the maker of what `find` finds once it is made, such as prepared weights.

        name: a digest that stands for the work
        on_wait, limit_s: as for `Store.lease`
        """
        if not self.writable:
            return contextlib.nullcontext(Lease[T](None, False, 0.0))
        path = self._path("leases", name)
        return single_flight(path.parent, path.name, find, on_wait=on_wait, limit_s=limit_s)

    def evict(self) -> Evicted:
        """Brings the folder within its bounds, and removes what crashed processes left behind.

        What this process has found or made stays whatever the bounds: a model needs its artifact and its weights.
        """
        if not self.writable:
            return Evicted(())
        with self._timed():
            evicted = evict(self.root, self.bounds, self._in_use)
        self.counters.evicted += len(evicted.paths)
        if evicted.paths:
            log.info("cache evicted files=%d bytes=%d", len(evicted.paths), evicted.bytes)
        return evicted

    def _path(self, folder: str, name: str) -> Path:
        """Returns where a record, a blob or a pin lies. Raises: CacheError for a name that is no digest."""
        if not _NAME.fullmatch(name):
            raise CacheError(f"{name!r} is not the name of anything in the cache", "names are 32 or 64 hex digits")
        match folder:
            case "blobs" | "prepared":
                return self.root / folder / name[:2] / name
            case "index" | "bindings" | "signatures" | "verdicts":
                return self.root / folder / f"{name}.json"
            case _:
                return self.root / folder / name

    def _warn(self, kind: str, message: str) -> None:
        """Warns once of each kind of trouble; the rest goes to the debug log."""
        log.log(logging.DEBUG if kind in self._warned else logging.WARNING, "%s", message)
        self._warned.add(kind)

    def not_kept(self, what: str, error: OSError | CacheError) -> None:
        """Warns, once for all there is, that something is used but cannot be kept."""
        reason = error.message if isinstance(error, CacheError) else error.strerror or str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space or lower --max-cache-size" if full else ""
        self._warn("write", f"the {what} is used but cannot be kept in {self.root}: {reason}{advice}")

    def _set_aside(self, error: CacheError, *paths: Path) -> None:
        """Moves damaged files out of the way, so that they are made again and can still be looked at.

        What cannot be moved is passed over by this process from now on.
        """
        self.counters.quarantined += 1
        self._warn(f"damaged {paths[0]}", f"damaged cache entry, made again: {error.message}")
        for path in paths:
            try:
                if self.writable:
                    os.replace(path, unused_name(self.root / "quarantine", f"-{path.name}"))
                else:
                    self._unusable.add(path)
            except FileNotFoundError:
                pass  # another process has done the same
            except OSError:
                self._unusable.add(path)

    def _touch(self, path: Path) -> None:
        """Notes a use for eviction, in the file's own time."""
        if self.writable:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > TOUCH_AFTER_S:
                    os.utime(path)

    def _is_outdated(self, created: float) -> bool:
        """Tells whether the policy `redo` passes over what was made then; what was made since the start is used."""
        return self.policy == "redo" and created < self._opened

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.counters.seconds += time.perf_counter() - started
