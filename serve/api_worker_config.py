"""What a further API process is told at its start, as one line of JSON."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ..cache.config import CacheConfig
from .config import ServerConfig


class ApiWorkerConfig(BaseModel):
    """The server, the checkpoint's folder, the engine, and the inherited socket."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    server: ServerConfig
    model_name: str
    folder: Path
    weight_path: Path | None = None
    """Where the text side is read from as well, for a folder without a tokenizer."""
    cache: CacheConfig | None = None
    """Where what had to be converted for the text side is kept."""
    endpoint: str
    listener: int
    """The file descriptor."""
    log_level: str
