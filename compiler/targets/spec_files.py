"""The data files on hardware, `specs/<platform>.toml`: figures, each with its source."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

PLATFORMS = ("cuda", "hip", "tpu", "cpu")


@functools.cache
def read(platform: str) -> dict[str, Any]:
    """The data file of a platform, parsed."""
    return tomllib.loads((Path(__file__).parent / "specs" / f"{platform}.toml").read_text(encoding="utf-8"))


def architectures(platform: str) -> tuple[str, ...]:
    """The architectures that the data file knows."""
    return tuple(read(platform)["arch"])


def figures(platform: str, arch: str) -> dict[str, Any]:
    """Everything known of an architecture, without the sources; for GPUs with what all of the platform share."""
    data = read(platform)
    row = data.get("common", {}) | data["arch"][arch]
    return {name: value[0] if isinstance(value, list) else value for name, value in row.items()}


def versions(platform: str) -> dict[str, str]:
    """The least versions of libraries that a host needs to load the code."""
    return {name: value for name, (value, _) in read(platform).get("versions", {}).items()}
