"""What is in the store: its entries with all that belongs to them, by their names or by what they were made from."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from .. import CacheError, ConfigError
from .binding import Binding
from .folder import read_small
from .key import Difference, Key, explain
from .open_folder import OpenFolder
from .record import ActionRecord, decode
from .signing import SignatureRecord

_NEAREST_OF = 500
_MIN_NAME = 4


@dataclass(frozen=True)
class Entry:
    """An artifact under a key, and what the store holds beside it."""

    record: ActionRecord
    used: float
    """Seconds since the epoch."""
    pinned: bool
    signers: tuple[str, ...]
    """Who signed it, whether trusted or not."""
    bindings: tuple[Binding, ...]

    @property
    def key(self) -> Key:
        return Key(self.record.key, self.record.factors)

    @property
    def architecture(self) -> str:
        return str(self.record.factors.get("architecture", ""))

    @property
    def target(self) -> str:
        spec = self.record.factors.get("target")
        if not isinstance(spec, dict):
            return ""
        parts = [str(spec.get(name, "")) for name in ("platform", "arch", "topology")]
        return ":".join(parts[:2] if parts[2] in ("", "1x1") else parts)

    @property
    def checkpoints(self) -> list[str]:
        """The folders of the checkpoints that are bound to it."""
        return sorted({binding.checkpoint.path for binding in self.bindings})

    def to_json(self) -> dict[str, Any]:
        """Everything but the factors, for listings."""
        record = self.record
        return {
            "key": record.key,
            "artifact": record.mef,
            "bytes": record.bytes,
            "architecture": self.architecture,
            "target": self.target,
            "created": record.created,
            "used": self.used,
            "seconds": record.seconds,
            "command": record.command,
            "pinned": self.pinned,
            "signers": list(self.signers),
            "checkpoints": self.checkpoints,
            "prepared": sorted({binding.prepared for binding in self.bindings}),
        }


def records(store: OpenFolder) -> Iterator[tuple[float, ActionRecord]]:
    """Yields the readable index entries with the time of their last use, the most recently used first."""
    dated: list[tuple[float, str]] = []
    if store.readable:
        with contextlib.suppress(OSError):
            dated = [(entry.stat().st_mtime, entry.path) for entry in os.scandir(store.root / "index")]
    for used, path in sorted(dated, reverse=True):
        with contextlib.suppress(OSError, CacheError):
            yield used, decode(read_small(path), ActionRecord, path)


def entries(store: OpenFolder) -> list[Entry]:
    """Returns all entries, the most recently used first."""
    bound: dict[str, list[Binding]] = {}
    for binding in _read(store.root / "bindings", Binding):
        bound.setdefault(binding.key, []).append(binding)
    signed = {record.key: record for record in _read(store.root / "signatures", SignatureRecord)}
    pins = set(_names(store.root / "pins"))
    return [
        Entry(
            record,
            used,
            record.key in pins,
            _signers(signed.get(record.key), record),
            tuple(bound.get(record.key, ())),
        )
        for used, record in records(store)
    ]


def _signers(signed: SignatureRecord | None, record: ActionRecord) -> tuple[str, ...]:
    if signed is None or signed.mef != record.mef:
        return ()
    return tuple(each.signer for each in signed.signatures)


def find(store: OpenFolder, name: str) -> Entry:
    """The entry whose key or artifact begins with `name`. Raises: ConfigError for none, and for several."""
    return _chosen(entries(store), name, store.root)


def find_all(store: OpenFolder, names: tuple[str, ...]) -> list[Entry]:
    """The entries of several names, or all entries for no name. Raises: ConfigError as `find` does."""
    found = entries(store)
    return [_chosen(found, name, store.root) for name in names] if names else found


def _chosen(found: list[Entry], name: str, root: Path) -> Entry:
    if len(name) < _MIN_NAME:
        raise ConfigError(f"{name!r} is too short a name", f"Give at least {_MIN_NAME} digits of a key.")
    chosen = [entry for entry in found if entry.record.key.startswith(name)]
    chosen = chosen or [entry for entry in found if entry.record.mef.startswith(name)][:1]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise ConfigError(f"{name} stands for {len(chosen)} entries", "Give more digits of the key.")
    raise ConfigError(f"there is no entry {name} in {root}", "`max cache ls` shows what there is.")


def nearest(store: OpenFolder, key: Key, *, among: int = _NEAREST_OF) -> tuple[ActionRecord, list[Difference]] | None:
    """Returns the stored record that differs from a key in the fewest factors, and those: why it is a miss."""
    found = [record for _, record in _first(records(store), among)]
    ranked = [(record, explain(key.factors, record.factors)) for record in found]
    return min((pair for pair in ranked if pair[1]), key=lambda pair: len(pair[1]), default=None)


def _first(found: Iterator[tuple[float, ActionRecord]], count: int) -> Iterator[tuple[float, ActionRecord]]:
    return (pair for pair, _ in zip(found, range(count), strict=False))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read[T: msgspec.Struct](folder: Path, record_type: type[T]) -> Iterator[T]:
    """Yields the readable records of a folder; what is damaged is `max cache verify`'s to tell."""
    for name in _names(folder):
        with contextlib.suppress(OSError, CacheError):
            yield decode(read_small(f"{folder}/{name}"), record_type, name)
