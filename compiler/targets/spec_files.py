"""The data files on hardware, `specs/<platform>.toml`: figures, each with its source."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

PLATFORMS = ("cuda", "hip", "tpu", "cpu")

UNVERIFIED = "unverified"
"""The source of a figure that no document says of this very product; its description says what it rests on."""


@functools.cache
def read(platform: str) -> dict[str, Any]:
    """The data file of a platform, parsed."""
    return tomllib.loads((Path(__file__).parent / "specs" / f"{platform}.toml").read_text(encoding="utf-8"))


def architectures(platform: str) -> tuple[str, ...]:
    """The architectures that the data file knows."""
    return tuple(read(platform)["arch"])


def figures(platform: str, arch: str) -> dict[str, Any]:
    """Everything known of an architecture, without the sources; for GPUs with what all of the platform share."""
    return {name: value for name, (value, _) in _row(platform, arch).items()}


def unverified(platform: str, arch: str) -> list[str]:
    """The names of the figures of an architecture that are used but were found in no document."""
    return [name for name, (_, source) in _row(platform, arch).items() if source == UNVERIFIED]


def versions(platform: str) -> dict[str, str]:
    """The least versions of libraries that a host needs to load the code."""
    return {name: value for name, (value, _) in read(platform).get("versions", {}).items()}


def memory_sizes(platform: str, arch: str) -> tuple[int, ...]:
    """Bytes of memory of the smallest device of an architecture that servers have, and of the one that is described,
    where they differ."""
    described = _row(platform, arch)["device_memory_size"]
    smallest = read(platform).get("least_memory", {}).get(arch, described)
    return tuple(sorted({smallest[0], described[0]}))


def _row(platform: str, arch: str) -> dict[str, list[Any]]:
    """The figures of an architecture and those that all of the platform share, each [value, source]."""
    data = read(platform)
    return data.get("common", {}) | data["arch"][arch]
