"""Keeping the store within its bounds: what was used least recently goes first, pinned and brand-new files stay."""

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import CacheError
from .binding import Binding
from .bounds import Bounds
from .folder import read_small
from .record import ActionRecord, decode
from .verdict import Verdict

# Evicting a little more than needed spares the next publications the walk through the store.
LOW_WATERMARK = 0.9
# A process may have published a blob and not yet its index entry, or be writing a temporary file.
GRACE_S = 3600.0
QUARANTINE_S = 7 * 86400.0
# Also artifacts outside of the store have verdicts, such as --precompiled-mefs.
VERDICT_S = 30 * 86400.0
_COUNTED = ("blobs", "prepared", "derived", "index", "bindings")


@dataclass(frozen=True)
class Evicted:
    """What an eviction removed, or would remove, with the bytes of each file."""

    paths: tuple[tuple[Path, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.paths)


@dataclass(frozen=True)
class _Candidate:
    """An artifact or prepared weights, with the files that go together and the time of the last use."""

    used: float
    bytes: int
    files: tuple[Path, ...]


def evict(root: Path, bounds: Bounds, keep: Collection[str] = (), *, dry_run: bool = False) -> Evicted:
    """Removes leftovers, and while the store is out of bounds the least recently used artifacts and prepared weights.

    keep: keys, and ids of prepared weights, that stay beside the pinned ones, such as the one just published
    dry_run: only tells what would go
    Files that cannot be removed, and those that another process removes meanwhile, are passed over.
    """
    now = time.time()
    chosen = list(_leftovers(root, now))
    protected = {*keep, *(path.name for path in _files(root / "pins"))}
    records, bindings = dict(_read(root / "index", ActionRecord)), list(_read(root / "bindings", Binding))
    for path, binding in bindings:
        if binding is None or root / "index" / f"{binding.key}.json" not in records:
            chosen.append(path)
        elif binding.key in protected:
            protected.add(binding.prepared)
    candidates = _artifacts(root, records, protected, now) + _prepared(root, protected)
    total = sum(_size(path) for folder in _COUNTED for path in _tree(root / folder))
    for candidate in _beyond(sorted(candidates, key=lambda candidate: candidate.used), total, bounds, root, now):
        chosen += candidate.files
    chosen += _orphans(root, records, bindings, set(chosen))
    sized = [(path, _size(path)) for path in chosen]
    return Evicted(tuple(each for each in sized if dry_run or _remove(each[0])))


def _beyond(candidates: list[_Candidate], total: int, bounds: Bounds, root: Path, now: float) -> Iterator[_Candidate]:
    """Yields what has to go, the least recently used first: all that is too old, then until there is room."""
    lacking = max(0, bounds.min_free_bytes - _free(root)) if bounds.min_free_bytes else 0
    shrink = total - bounds.max_bytes * LOW_WATERMARK if total > bounds.max_bytes else 0.0
    wanted = max(shrink, lacking)
    for candidate in candidates:
        too_old = bounds.max_age_s is not None and now - candidate.used > bounds.max_age_s
        if wanted > 0 or too_old:
            wanted -= candidate.bytes
            yield candidate


def _free(root: Path) -> int:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return 1 << 62


def _orphans(
    root: Path,
    records: dict[Path, ActionRecord | None],
    bindings: list[tuple[Path, Binding | None]],
    going: set[Path],
) -> Iterator[Path]:
    """Yields what belongs to artifacts that are going, or gone for so long that no process can be publishing them."""
    staying = {path: record for path, record in records.items() if path not in going}
    keys = {path.name for path in staying}
    for path, binding in bindings:
        if binding is not None and root / "index" / f"{binding.key}.json" in going:
            yield path
    mefs = {record.mef for record in staying.values() if record is not None}
    for path in _files(root / "signatures"):
        if path.name not in keys and time.time() - _used(path) > GRACE_S:
            yield path
    for path, verdict in _read(root / "verdicts", Verdict):
        if (verdict is None or verdict.mef not in mefs) and time.time() - _used(path) > VERDICT_S:
            yield path


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
    """Returns prepared weights and derived files, which a checkpoint can be made to give again."""
    return [
        _Candidate(_used(path), _size(path), (path,))
        for folder in ("prepared", "derived")
        for path in _tree(root / folder)
        if path.name not in protected
    ]


def _leftovers(root: Path, now: float) -> Iterator[Path]:
    """Yields what crashed processes left behind, and what was quarantined long ago."""
    for folder, age_s in (("tmp", 24 * GRACE_S), ("leases", 24 * GRACE_S), ("quarantine", QUARANTINE_S)):
        yield from (path for path in _files(root / folder) if now - _used(path) > age_s)


def _read[T: (ActionRecord, Binding, Verdict)](folder: Path, record_type: type[T]) -> Iterator[tuple[Path, T | None]]:
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


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
