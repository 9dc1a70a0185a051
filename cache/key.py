"""Keys: everything that decides what a compiled artifact contains, and one digest over all of it."""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from .. import CacheError, ConfigError
from .canonical import canonical_json, plain
from .mef import VERSION as MEF_VERSION

_SOURCE_SUFFIXES = (".py", ".cpp", ".cc", ".h")
# The packages whose version decides what XLA emits, per platform; an installed plugin for another platform does not.
# Only what a host needs to load the code as well: one without an assembler must find what one with it has made.
_ALWAYS = ("mef", "jax", "jaxlib", "flax")
_PLUGINS = {"cuda": ("jax-cuda13-pjrt",), "rocm": ("jax-rocm7-pjrt",), "tpu": ("libtpu",)}


@dataclass(frozen=True)
class Key:
    """The name of a compiled artifact, with the factors it was computed from."""

    digest: str
    factors: dict[str, Any] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.digest


class Absent(Enum):
    """Stands for a factor that one of two keys does not have."""

    ABSENT = "(absent)"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Difference:
    """One factor in which two keys differ; `path` is dotted, such as `model.num_layers`."""

    path: str
    wanted: Any
    have: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.wanted} wanted, {self.have} stored"


def make_key(factors: dict[str, Any]) -> Key:
    """Returns the key of these factors: xxh3-128 over their canonical JSON, 32 hex digits.

    Raises: TypeError for a factor that JSON cannot hold.
    """
    held = plain(factors, "factors")
    return Key(xxhash.xxh3_128_hexdigest(canonical_json(held)), held)


def lowered_key(factors: dict[str, Any]) -> Key:
    """Returns the key of the StableHLO from which the artifact of these factors is compiled.

    What only compiles it is no factor: a host without the target's compiler finds and makes the same.
    """
    toolchain = {name: factors["toolchain"][name] for name in _ALWAYS if name in factors["toolchain"]}
    return make_key({**factors, "toolchain": toolchain, "form": "lowered"})


def explain(wanted: dict[str, Any], have: dict[str, Any]) -> list[Difference]:
    """Returns the factors in which two keys differ, by path; empty when both give the same digest."""
    left, right = _flat(plain(wanted)), _flat(plain(have))
    differences = []
    for path in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(path, Absent.ABSENT), right.get(path, Absent.ABSENT)
        if Absent.ABSENT in (ours, theirs) or canonical_json(ours) != canonical_json(theirs):
            differences.append(Difference(path, ours, theirs))
    return differences


def _flat(factors: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested objects to dotted paths; lists stay whole, since they are read better that way."""
    flat: dict[str, Any] = {}
    for name, value in factors.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def source_digest(paths: Iterable[Path], without: Collection[Path] = ()) -> str:
    """Returns one digest (32 hex digits) over the Python and C++ sources in `paths`, which are folders or files.

    without: folders whose sources do not count
    Names count relative to their folder and contents in full; times, modes and the folders' own places do not.
    Raises: CacheError when a path has no sources, as a digest over nothing would never change.
    """
    sources = []
    for path in paths:
        found = [(path.name, path)] if path.is_file() else list(_sources_below(path, without))
        if not found:
            raise CacheError(f"{path} holds no source files", "reinstall the package with its sources")
        try:
            sources += [[name, xxhash.xxh3_128_hexdigest(file.read_bytes())] for name, file in found]
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error}", "check the permissions of the installation") from error
    return xxhash.xxh3_128_hexdigest(canonical_json(sorted(sources)))


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file that a setting names. Raises: ConfigError when it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from error


def _sources_below(folder: Path, without: Collection[Path]) -> Iterable[tuple[str, Path]]:
    for file in folder.rglob("*"):
        if any(left_out in file.parents for left_out in without):
            continue
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.suffix in _SOURCE_SUFFIXES and not hidden and file.is_file():
            yield f"{folder.name}/{relative.as_posix()}", file


def toolchain(platform: str = "cpu") -> dict[str, str]:
    """Returns the versions that decide what is compiled for a platform: cpu, cuda, rocm or tpu.

    They come from the installed packages' metadata; nothing is imported. A package that is not installed is left out.
    """
    versions = {"mef": f"{MEF_VERSION[0]}.{MEF_VERSION[1]}"}
    for package in (*_ALWAYS[1:], *_PLUGINS.get(platform, ())):
        if version := _installed(package):
            versions[package] = version
    return versions


@cache
def _installed(package: str) -> str | None:
    import importlib.metadata  # 40 ms, and most users of keys already have a key

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
