"""The folder under the store: private to its owner, filled by renames, and patient with network file systems.

Artifacts are code that will be run, so a folder in which somebody else may put files is used for signed ones at most.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from .. import CacheError
from .record import MAX_RECORD_BYTES
from .trust import distrust_of

LAYOUT = "1"
SUBFOLDERS = (
    "blobs",
    "index",
    "signatures",
    "verdicts",
    "bindings",
    "prepared",
    "derived",
    "pins",
    "tmp",
    "leases",
    "quarantine",
)
_PASSING = (errno.ESTALE, errno.EBUSY, errno.EINTR)
_PAUSES_S = (0.01, 0.04, 0.16)


class Untrusted(CacheError):
    """Others may put files into the folder: nothing in it may be used unless it is signed."""


def retrying[**P, R](call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls again where a network file system is known to fail for a moment (ESTALE, EBUSY). Raises: OSError."""
    for pause in _PAUSES_S:
        try:
            return call(*args, **kwargs)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(pause)
    return call(*args, **kwargs)


def open_root(root: Path, *, create: bool, private: bool = True) -> bool:
    """Checks the folder, makes what is missing when `create`, and returns whether it can be written.

    private: whether others' folders, and those that others may write to, are refused
    Raises: FileNotFoundError when it is absent and not to be made; Untrusted; CacheError when it must not be used for
    another reason; OSError when it cannot be.
    """
    if create:
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700, parents=True)
    _check(root, private)
    for name in SUBFOLDERS:
        if create:
            # A read-only file system says so below, by os.access; what is there can still be read.
            with contextlib.suppress(OSError):
                (root / name).mkdir(mode=0o700)
        if (root / name).exists():
            _check(root / name, private)
    writable = all(os.access(root / name, os.W_OK | os.X_OK) for name in SUBFOLDERS)
    try:
        layout = read_small(root / "VERSION").decode("utf-8", "replace").strip()
    except FileNotFoundError:
        layout = LAYOUT
        if create and writable:
            write_small(root / "VERSION", f"{LAYOUT}\n".encode(), root / "tmp")
    if layout != LAYOUT:
        raise CacheError(
            f"the cache in {root} has layout {layout[:20]!r}, and this version reads {LAYOUT!r}",
            "name another folder with --cache-dir, or delete this one",
        )
    return writable


def _check(folder: Path, private: bool) -> None:
    distrust = distrust_of(folder)
    if private and distrust:
        own = os.stat(folder).st_uid == os.geteuid()
        mend = f"run: chmod 700 {folder}" if own else "name a folder of your own with --cache-dir"
        raise Untrusted(distrust, f"{mend}, or trust the keys that sign its artifacts (--trusted-keys)")


def read_small(path: Path | str) -> bytes:
    """Reads a record, and one byte more than a record can have at most. Raises: OSError."""
    return retrying(_read_small, path)


def _read_small(path: Path | str) -> bytes:
    # Listings read thousands of records: a buffered file of Python's costs three times as much.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data, wanted = b"", min(os.fstat(descriptor).st_size, MAX_RECORD_BYTES) + 1
        while piece := os.read(descriptor, wanted - len(data)):
            data += piece
        return data
    finally:
        os.close(descriptor)


def write_small(path: Path, data: bytes, temporary_folder: Path) -> None:
    """Writes a small file so that readers see all of it or none, also after a power cut. Raises: OSError."""
    temporary = unused_name(temporary_folder, path.suffix)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        move_into_place(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Makes a finished file durable and renames it to `path`, on the same file system. Raises: OSError."""
    with retrying(open, temporary, "rb") as file:
        os.fsync(file.fileno())
    path.parent.mkdir(mode=0o700, exist_ok=True)
    retrying(os.replace, temporary, path)
    descriptor = retrying(os.open, path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for folders; the rename itself has been done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def unused_name(folder: Path, suffix: str) -> Path:
    """Returns a path in `folder` that no other process will choose."""
    return folder / f"{os.getpid()}-{os.urandom(8).hex()}{suffix}"
