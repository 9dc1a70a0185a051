"""What an engine worker is told at its start, as one line of JSON."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ..runtime.config import QueueConfig, SchedulingConfig
from .pipeline import PipelineConfig


class WorkerConfig(BaseModel):
    """The checkpoint, the settings, and how the worker logs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    """Of the checkpoint; the built-in model has one too."""

    pipeline: PipelineConfig
    scheduling: SchedulingConfig = SchedulingConfig()
    queue: QueueConfig = QueueConfig()

    stall_timeout_s: float | None = None
    """Seconds without a step after which the worker ends itself, though there are requests."""

    spawned: float = 0.0
    """When the process was started, in seconds of time.time."""

    log_level: str = "WARNING"
    """Of this package's loggers, on stderr."""

    structured_logging: bool = False
    """One JSON object per line."""

    log_prefix: str = ""
    """Before every line."""
