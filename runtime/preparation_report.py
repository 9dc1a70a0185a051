"""What preparing a model did and gave."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..cache.mef import Mef
from ..compiler.limits import Limits
from .arena import Arena
from .session import CompiledModels


@dataclass
class Report:
    """What a preparation did, for people. Seconds by phase; phases that were not needed are not there."""

    key: str = ""
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    graphs: int = 0
    executables: int = 0
    compiled: bool = False
    weights_prepared: bool = False

    @property
    def was_cached(self) -> bool:
        return not self.compiled and not self.weights_prepared

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class PreparedWeights:
    """Prepared weights as a file of the store, in an arena, or both; without a cache that can be written, no file."""

    file: Path | None
    id: str
    arena: Arena | None


@dataclass(frozen=True)
class Prepared:
    """All that a start needs; `artifact_file` is None where the artifact is not kept."""

    artifact: Mef
    artifact_file: Path | None
    weights: PreparedWeights
    report: Report

    @property
    def limits(self) -> Limits:
        return Limits.from_json(self.compiled.facts["limits"])

    @cached_property
    def compiled(self) -> CompiledModels:
        """The artifact's graphs, read once: that takes milliseconds."""
        return CompiledModels(self.artifact)
