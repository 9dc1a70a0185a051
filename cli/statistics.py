"""Figures about one generation, for people on stderr and for machines as JSON."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass


@dataclass
class Statistics:
    """Seconds, tokens and bytes of one `max generate`; rates are tokens per second."""

    model: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    seed: int
    source: str
    startup_seconds: float
    first_token_seconds: float
    prefill_rate: float
    decode_rate: float
    peak_memory_bytes: int

    def lines(self) -> list[str]:
        """The statistics in two lines."""
        return [
            f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens, ended by {self.finish_reason}, "
            f"seed {self.seed}",
            f"startup {self.startup_seconds:.2f} s ({self.source}), "
            f"first token after {self.first_token_seconds * 1e3:.0f} ms, "
            f"prefill {self.prefill_rate:,.0f} tok/s, decode {self.decode_rate:,.1f} tok/s, "
            f"peak memory {self.peak_memory_bytes / 1e6:,.0f} MB",
        ]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def process_seconds() -> float:
    """Seconds since this process was started, imports of the interpreter included."""
    with open("/proc/self/stat", encoding="ascii") as file:
        started_ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def peak_memory_bytes() -> int:
    """The largest resident set so far, of this program alone: getrusage counts that of the process which started it."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        kibibytes = next(line.split()[1] for line in file if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024
