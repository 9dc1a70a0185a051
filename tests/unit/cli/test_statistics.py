"""Statistics: the two lines, and figures of this process that can be checked from outside."""

from __future__ import annotations

import subprocess
import sys
import time

from max.cli.statistics import Statistics, process_seconds

FIGURES = Statistics(
    model="/m",
    prompt_tokens=3,
    new_tokens=40,
    finish_reason="stop",
    seed=7,
    source="bound",
    startup_seconds=0.456,
    first_token_seconds=0.0123,
    prefill_rate=12345.6,
    decode_rate=98.76,
    peak_memory_bytes=210_000_000,
)


def test_two_lines_with_units() -> None:
    assert FIGURES.lines() == [
        "3 prompt tokens, 40 new tokens, ended by stop, seed 7",
        "startup 0.46 s (bound), first token after 12 ms, prefill 12,346 tok/s, decode 98.8 tok/s, peak memory 210 MB",
    ]


def test_json_holds_every_field_under_its_name() -> None:
    assert FIGURES.to_json() == vars(FIGURES)


def test_seconds_count_from_the_start_of_the_process() -> None:
    script = "import time; time.sleep(0.3); from max.cli.statistics import process_seconds as f; print(f())"
    began = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True, timeout=60
    )
    assert 0.29 < float(shown.stdout) <= time.monotonic() - began + 0.02  # the kernel counts in hundredths
    assert process_seconds() > 0


def test_peak_memory_sees_what_was_allocated_and_not_what_its_parent_holds() -> None:
    held = bytearray(b"x") * 400_000_000
    script = (
        "from max.cli.statistics import peak_memory_bytes as f; before = f(); b'x' * 200_000_000; print(before, f())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True, timeout=60
    )
    before, after = map(int, shown.stdout.split())
    assert before < 100_000_000 < 190_000_000 < after < len(held)
