"""What this process did with its stores: hits by kind, misses by reason, bytes, seconds; ready to be exported."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One figure in the form of a Prometheus counter; bytes and seconds are in the name."""

    name: str
    help: str
    labels: dict[str, str]
    value: float


@dataclass
class Counters:
    """Grows only. `hits` by how the artifact was come by: exact, compatible, remote, precompiled.

    `misses` by reason: absent, damaged, incomplete, unsigned, unsound, outdated, off and so on.
    """

    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    """Artifacts made by this process, by what from: `lowered` (the stored IR) or `traced`."""
    quarantined: int = 0
    evicted: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_fetched: int = 0
    """From the remote."""
    seconds: float = 0.0
    """Spent inside of the store and its remote."""

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Counters":
        """The counters of another process, as its `to_json` gave them."""
        counted = {name: Counter(value[name]) for name in ("hits", "misses", "made")}
        return cls(**{**value, **counted})

    def samples(self) -> Iterator[Sample]:
        """Yields every figure, for a metrics endpoint."""
        families = (
            ("hits", "kind", "Artifacts found, by how they were come by"),
            ("misses", "reason", "Artifacts that were not found, by reason"),
            ("made", "source", "Artifacts made, by what they were made from"),
        )
        for name, label, text in families:
            for value, count in sorted(getattr(self, name).items()):
                yield Sample(f"executable_cache_{name}", text, {label: value}, count)
        figures = (
            ("quarantined", "Entries set aside as damaged"),
            ("evicted", "Files removed to stay within bounds"),
            ("bytes_read", "Bytes of artifacts found"),
            ("bytes_written", "Bytes of artifacts and prepared weights kept"),
            ("bytes_fetched", "Bytes taken from the remote"),
            ("seconds", "Seconds spent in the store and its remote"),
        )
        for name, text in figures:
            yield Sample(f"executable_cache_{name}", text, {}, float(getattr(self, name)))
