"""An examination of the cache folder: everything that people ask for when a cache does not do what it should."""

import contextlib
import importlib.metadata
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import CacheError, ConfigError, MaxError, __version__
from .binding import Binding
from .config import CacheConfig
from .folder import LAYOUT, SUBFOLDERS, move_into_place, read_small, unused_name
from .lease import alive_holders
from .record import ActionRecord, decode
from .trust import Trust, distrust_of, is_foreign_file

State = Literal["ok", "warning", "trouble"]

# On these, locks, times or renames may behave otherwise than on a local disk.
_SHARED = ("nfs", "nfs4", "cifs", "smb3", "fuse", "9p", "ceph", "lustre", "gpfs", "glusterfs", "beegfs", "virtiofs")
_SKEW_S = 5.0


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    state: State
    detail: str


def examine(config: CacheConfig) -> list[Finding]:
    """Runs all checks; only what a check is about is told in its finding, and none stops the others."""
    root = config.folder
    if not root.exists():
        return [Finding("folder", "warning", f"{root} is not there; the first start makes it"), *_versions(config)]
    checks: tuple[Callable[[CacheConfig, Path], Iterator[Finding]], ...] = (
        _folder, _layout, _filesystem, _writing, _space, _leases, _orphans, _quarantine, _trust,
    )  # fmt: skip
    found: list[Finding] = []
    for check in checks:
        try:
            found += check(config, root)
        except OSError as error:
            found.append(Finding(check.__name__.strip("_"), "trouble", f"{error.filename}: {error.strerror}"))
    return [*found, *_versions(config)]


def _folder(config: CacheConfig, root: Path) -> Iterator[Finding]:
    state = root.stat()
    mode = stat.S_IMODE(state.st_mode)
    detail = f"{root}, mode {mode:04o}, owner {state.st_uid}"
    for folder in (root, *(root / name for name in SUBFOLDERS if (root / name).exists())):
        if distrust := distrust_of(folder):
            yield Finding("folder", "trouble", f"{distrust}: only signed artifacts are used from here")
            return
    if mode & 0o020:
        yield Finding("folder", "warning", f"{detail}: its group may write; what others put there needs a signature")
    else:
        yield Finding("folder", "ok", detail)


def _layout(config: CacheConfig, root: Path) -> Iterator[Finding]:
    try:
        layout = read_small(root / "VERSION").decode("utf-8", "replace").strip()
    except FileNotFoundError:
        yield Finding("layout", "warning", "there is no VERSION file; the next start that may write makes it")
        return
    missing = [name for name in SUBFOLDERS if not (root / name).is_dir()]
    if layout != LAYOUT:
        yield Finding("layout", "trouble", f"layout {layout[:20]!r}, and this version reads {LAYOUT!r}")
    elif missing:
        yield Finding("layout", "warning", f"not there yet: {', '.join(missing)}")
    else:
        yield Finding("layout", "ok", f"layout {layout}")


def _filesystem(config: CacheConfig, root: Path) -> Iterator[Finding]:
    kind = _mounted_as(root.resolve())
    if kind.partition(".")[0] in _SHARED:
        detail = f"{kind}: shared by hosts; a folder for each, with this one as --cache-remote file://, is quicker"
        yield Finding("filesystem", "warning", detail)
    elif kind == "tmpfs":
        yield Finding("filesystem", "warning", "tmpfs: gone after a restart, and takes memory")
    else:
        yield Finding("filesystem", "ok", kind or "unknown")


def _mounted_as(path: Path) -> str:
    """The type of the file system that a path lies on, by the longest mount point above it."""
    best, kind = "", ""
    try:
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split()
        place = fields[1].encode().decode("unicode_escape") if len(fields) > 2 else ""
        if place and len(place) >= len(best) and (path == Path(place) or Path(place) in path.parents):
            best, kind = place, fields[2]
    return kind


def _writing(config: CacheConfig, root: Path) -> Iterator[Finding]:
    """Does once what publishing does: write, fsync, rename; and compares the file system's clock with this host's."""
    temporary, target = unused_name(root / "tmp", ".doctor"), unused_name(root / "tmp", ".doctor-moved")
    try:
        temporary.write_bytes(b"x" * 4096)
        skew = temporary.stat().st_mtime - time.time()
        move_into_place(temporary, target)
    except OSError as error:
        yield Finding("writing", "warning", f"read-only: {error.strerror}; what it lacks is made and not kept")
        return
    finally:
        for path in (temporary, target):
            with contextlib.suppress(OSError):
                path.unlink()
    yield Finding("writing", "ok", "files can be written, made durable and renamed")
    if abs(skew) > _SKEW_S:
        yield Finding("clock", "warning", f"the file system's clock is {skew:+.0f} s from this host's")
    else:
        yield Finding("clock", "ok", "the file system's clock is this host's")


def _space(config: CacheConfig, root: Path) -> Iterator[Finding]:
    used = sum(path.stat().st_size for name in ("blobs", "prepared") for path in _files(root / name))
    free = shutil.disk_usage(root).free
    detail = f"{used / 1e9:.1f} of {config.max_cache_size / 1e9:.1f} GB used, {free / 1e9:.1f} GB free on the disk"
    short = free < max(int(config.min_free_space), 1 << 30)
    yield Finding("space", "warning" if short or used > config.max_cache_size else "ok", detail)


def _leases(config: CacheConfig, root: Path) -> Iterator[Finding]:
    live, dead = alive_holders(root / "leases")
    if dead:
        yield Finding("leases", "warning", f"{len(dead)} of processes that are gone; the next one takes them over")
    who = f": {', '.join(live)}" if live else ""
    yield Finding("leases", "ok", f"{len(live)} held{who}")


def _orphans(config: CacheConfig, root: Path) -> Iterator[Finding]:
    records = _records(root)
    mefs = {record.mef for record in records.values()}
    blobs = {path.name for path in _files(root / "blobs")}
    bindings = [binding for binding in _bindings(root) if binding is not None]
    prepared = {path.name for path in _files(root / "prepared")}
    counts = {
        "entries without an artifact": len(mefs - blobs),
        "artifacts without an entry": len(blobs - mefs),
        "bindings without an entry": sum(binding.key not in records for binding in bindings),
        "prepared weights without a binding": len(prepared - {binding.prepared for binding in bindings}),
        "temporary files": len(_files(root / "tmp")),
        "files of other users": sum(map(is_foreign_file, [*_files(root / "blobs"), *_files(root / "index")])),
    }
    bad = [f"{count} {what}" for what, count in counts.items() if count]
    if bad:
        yield Finding("orphans", "warning", f"{', '.join(bad)}; `max cache prune` removes what nobody needs")
    else:
        yield Finding("orphans", "ok", f"{len(records)} entries, nothing without its counterpart")


def _quarantine(config: CacheConfig, root: Path) -> Iterator[Finding]:
    found = _files(root / "quarantine")
    if found:
        detail = f"{len(found)} damaged files were set aside; a disk that damages files is worth a look"
        yield Finding("quarantine", "warning", detail)
    else:
        yield Finding("quarantine", "ok", "nothing was ever damaged, or not within a week")


def _trust(config: CacheConfig, root: Path) -> Iterator[Finding]:
    trust = Trust.of(config)
    try:
        keys = trust.keys
    except ConfigError as error:
        yield Finding("signatures", "trouble", error.message)
        return
    needed = "required" if trust.required else "not required"
    empty = trust.required and not keys
    yield Finding("signatures", "trouble" if empty else "ok", f"{needed}; {len(keys)} keys in {trust.keys_file}")


def _versions(config: CacheConfig) -> Iterator[Finding]:
    names = [f"max {__version__}"]
    for package in ("jax", "jaxlib", "flax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            names.append(f"{package} {importlib.metadata.version(package)}")
    yield Finding("versions", "ok", ", ".join(names))


def _records(root: Path) -> dict[str, ActionRecord]:
    found = {}
    for path in _files(root / "index"):
        with contextlib.suppress(OSError, CacheError):
            found[path.stem] = decode(read_small(path), ActionRecord, path)
    return found


def _bindings(root: Path) -> Iterator[Binding | None]:
    for path in _files(root / "bindings"):
        try:
            yield Binding.decoded(read_small(path), path)
        except (OSError, MaxError):
            yield None


def _files(folder: Path) -> list[Path]:
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]
