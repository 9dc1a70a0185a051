"""The measurement counts the tokens that were streamed, and compares them with its bar."""

from __future__ import annotations

from max.bench.serve_overhead import Overhead


def test_the_rate_is_that_of_one_core() -> None:
    found = Overhead(streams=64, tokens=25_600, cpu_s=2.0, wall_s=1.5)
    assert found.tokens_per_cpu_s == 12_800
    assert "12,800 tokens per second of a core" in found.line() and found.line().endswith("met)")
    assert Overhead(64, 25_600, 20.0, 21.0).line().endswith("missed)")
