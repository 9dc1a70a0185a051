"""Keeping the store under its size: what was used least recently goes first, pinned and brand-new files stay."""

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import CacheError
from .binding import Binding
from .folder import read_small
from .record import ActionRecord, decode

# Evicting a little more than needed spares the next publications the walk through the store.
LOW_WATERMARK = 0.9
# A process may have published a blob and not yet its index entry, or be writing a temporary file.
GRACE_S = 3600.0
QUARANTINE_S = 7 * 86400.0


@dataclass(frozen=True)
class Evicted:
    """How much an eviction removed."""

    files: int
    bytes: int


@dataclass(frozen=True)
class _Candidate:
    """An artifact or prepared weights, with the files that go together and the time of the last use."""

    used: float
    bytes: int
    files: tuple[Path, ...]


def evict(root: Path, max_bytes: int, keep: Collection[str] = ()) -> Evicted:
    """Removes leftovers, and while there are too many bytes the least recently used artifacts and prepared weights.

    keep: keys, and ids of prepared weights, that stay beside the pinned ones, such as the one just published
    Files that cannot be removed, and those that another process removes meanwhile, are passed over.
    """
    now = time.time()
    removed = [_remove(path) for path in _leftovers(root, now)]
    protected = {*keep, *(path.name for path in _files(root / "pins"))}
    records, bindings = _records(root), _bindings(root)
    for path, binding in bindings:
        if binding is None or root / "index" / f"{binding.key}.json" not in records:
            removed.append(_remove(path))
        elif binding.key in protected:
            protected.add(binding.prepared)
    candidates = _artifacts(root, records, protected, now) + _prepared(root, protected)
    total = sum(_size(path) for folder in ("blobs", "prepared", "index", "bindings") for path in _tree(root / folder))
    if total > max_bytes:
        for candidate in sorted(candidates, key=lambda candidate: candidate.used):
            if total <= max_bytes * LOW_WATERMARK:
                break
            removed += [_remove(path) for path in candidate.files]
            total -= candidate.bytes
    return Evicted(sum(size is not None for size in removed), sum(size or 0 for size in removed))


def _artifacts(
    root: Path, records: dict[Path, ActionRecord | None], protected: set[str], now: float
) -> list[_Candidate]:
    """Returns blobs with all the index entries that name them, and either without the other."""
    entries: dict[str, list[Path]] = {}
    for path, record in records.items():
        entries.setdefault(record.mef if record is not None else "", []).append(path)
    candidates = []
    for blob in _tree(root / "blobs"):
        named_by = entries.pop(blob.name, [])
        if any(path.stem in protected for path in named_by):
            continue
        if not named_by and now - _used(blob) < GRACE_S:
            continue
        files = (*named_by, blob)  # the index entry first: its presence says that the blob is there
        used = max((_used(path) for path in named_by), default=0.0)
        candidates.append(_Candidate(used, sum(_size(path) for path in files), files))
    orphans = [path for paths in entries.values() for path in paths]
    return candidates + [_Candidate(0.0, _size(path), (path,)) for path in orphans]


def _prepared(root: Path, protected: set[str]) -> list[_Candidate]:
    return [
        _Candidate(_used(path), _size(path), (path,)) for path in _tree(root / "prepared") if path.name not in protected
    ]


def _leftovers(root: Path, now: float) -> Iterator[Path]:
    """Yields what crashed processes left behind, and what was quarantined long ago."""
    for folder, age_s in (("tmp", 24 * GRACE_S), ("leases", 24 * GRACE_S), ("quarantine", QUARANTINE_S)):
        yield from (path for path in _files(root / folder) if now - _used(path) > age_s)


def _records(root: Path) -> dict[Path, ActionRecord | None]:
    return dict(_read(root / "index", ActionRecord))


def _bindings(root: Path) -> list[tuple[Path, Binding | None]]:
    return list(_read(root / "bindings", Binding))


def _read[T: (ActionRecord, Binding)](folder: Path, record_type: type[T]) -> Iterator[tuple[Path, T | None]]:
    """Yields the records in a folder, and None for damaged ones; those that cannot be read now are left out."""
    for path in _files(folder):
        try:
            yield path, decode(read_small(path), record_type, path)
        except CacheError:
            yield path, None
        except OSError:
            continue


def _files(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []


def _tree(folder: Path) -> list[Path]:
    """Returns the files in `folder` and in its subfolders, one level deep."""
    found = _files(folder)
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                found += _files(Path(entry.path))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _remove(path: Path) -> int | None:
    """Returns the bytes that are gone with the file; None when it could not be removed."""
    size = _size(path)
    try:
        path.unlink()
    except OSError:
        return None
    return size
