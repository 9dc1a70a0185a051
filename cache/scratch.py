"""Scratch folders: temporary ones that are gone with their process, or else when the next process makes one.

A process holds a lock on each of its folders, which the kernel gives back however the process ends. What is found
without one, and was not made just now, was left by a process that could not tidy up.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

Kind = Literal["compile", "xla-dump", "metrics", "serve", "bench"]
_OURS = re.compile(rf"max-({'|'.join(get_args(Kind))})-\w{{8}}")
_YOUNG_S = 60.0  # between the making of a folder and its lock lies less
_live: dict[Path, int] = {}
"""The folders of this process, each with the process that made it: a fork has them too."""


class Scratch:
    """A private folder in the system's place for temporary files, removed by `remove`, `with`, or at the latest by the
    end of the process."""

    def __init__(self, kind: Kind) -> None:
        """Raises OSError where no folder can be made."""
        _sweep()
        self.path = Path(tempfile.mkdtemp(prefix=f"max-{kind}-"))
        _live[self.path] = os.getpid()
        lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # where there are no locks, nothing is ever swept
            fcntl.flock(lock, fcntl.LOCK_EX)
        self.remove = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def remove_all() -> None:
    """Removes the folders of this process, which is about to end without any more tidying."""
    for path, maker in list(_live.items()):
        if maker == os.getpid():
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path, lock: int) -> None:
    if _live.get(path) == os.getpid():
        shutil.rmtree(path, ignore_errors=True)
        del _live[path]
    os.close(lock)


def _sweep() -> None:
    """Removes what processes of this user left that were killed."""
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name) and _is_left(entry):
                shutil.rmtree(entry.path, ignore_errors=True)


def _is_left(entry: os.DirEntry[str]) -> bool:
    try:
        found = entry.stat(follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or time.time() - found.st_mtime < _YOUNG_S:
            return False
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
