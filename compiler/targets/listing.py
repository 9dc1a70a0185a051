"""All targets with what each needs here: the rows of `max list --targets`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from . import spec_files
from .attached import attached
from .target import Target, target_names
from .toolchain import PLUGINS, install_command, missing, why_not


@dataclass(frozen=True)
class TargetRow:
    """One target on this host.

    default_for:  the shorter names that mean this target
    needs:        distributions that compiling takes; missing: those that are not installed; install: the command
    can_compile:  whether code can be made here now; reason says why not whatever is installed
    can_run:      whether this host has such a device
    unverified:   figures of the hardware that no document says of this very product
    """

    target: str
    hardware: str
    default_for: list[str]
    needs: list[str]
    missing: list[str]
    install: str
    can_compile: bool
    reason: str
    can_run: bool
    unverified: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def target_rows() -> Iterator[TargetRow]:
    """A row for every distinct target, in the order of the data files."""
    short: dict[Target, list[str]] = {}
    for name in target_names():
        short.setdefault(Target.parse(name), []).append(name)
    for target, names in short.items():
        plugin, reason, absent = PLUGINS.get(target.platform), why_not(target), missing(target)
        tools = ["nvidia-cuda-nvcc", "nvidia-nvvm"] if target.platform == "cuda" else []
        yield TargetRow(
            target=target.name,
            hardware=target.figures.get("name", "the CPU of this host" if target.is_native else ""),
            default_for=[name for name in names if name != target.name],
            needs=[plugin.distribution, *tools] if plugin else [],
            missing=absent,
            install=install_command(target.platform) if absent else "",
            can_compile=not (reason or absent),
            reason=reason,
            can_run=target.runs_here() or target.arch in attached(target.platform),
            unverified=[] if target.platform == "cpu" else spec_files.unverified(target.platform, target.arch),
        )
