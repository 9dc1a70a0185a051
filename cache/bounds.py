"""How much the store may hold, and for how long."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import CacheConfig

_DAY_S = 86400.0


@dataclass(frozen=True)
class Bounds:
    """What eviction holds the store to; pinned artifacts are beyond it."""

    max_bytes: int
    max_age_s: float | None = None
    """Since the last use; None for no limit."""
    min_free_bytes: int = 0
    """On the store's file system."""

    @classmethod
    def of(cls, config: "CacheConfig") -> "Bounds":
        days = config.max_cache_age
        return cls(int(config.max_cache_size), None if days is None else days * _DAY_S, int(config.min_free_space))
