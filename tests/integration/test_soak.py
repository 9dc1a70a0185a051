"""A short run of what `python -m max.bench.soak` does for minutes: memory stays as it is under steady work."""

from __future__ import annotations

import pytest

from max.bench.soak import soak


@pytest.mark.slow
def test_memory_stays_as_it_is_under_steady_work(model, filled_cache, small):
    arguments = ["--model", str(model), "--cache-dir", str(filled_cache), *small]
    result = soak(arguments, seconds=8, concurrency=8, samples=40)
    assert result.ended["finished"] > 20
    assert result.ended["dropped"] > 0
    assert result.ended["400"] > 0
    assert set(result.ended) == {"finished", "dropped", "400"}, "nothing else happens"
    for samples in result.memory_mb.values():
        assert samples[-1] - samples[10] < 16
