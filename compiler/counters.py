"""How much was traced, compiled and loaded in this process: a warm start must show zeros for the first two."""

from dataclasses import dataclass


@dataclass
class Counters:
    traced: int = 0
    compiled: int = 0
    loaded: int = 0

    def __str__(self) -> str:
        return f"traced={self.traced} compiled={self.compiled} loaded={self.loaded}"


COUNTERS = Counters()
