"""How much memory counts as grown, and what a soak says of itself."""

from __future__ import annotations

from collections import Counter

import pytest

from max.bench.soak import Result, growth


@pytest.mark.parametrize(
    ("samples", "wanted"),
    [
        ([], 0.0),
        ([5.0, 9.0], 0.0),
        ([1.0, 50.0, 50.0, 50.0], 0.0),
        ([1.0, 1.0, 50.0, 50.0, 50.0, 50.0, 60.0, 62.0], 11.0),
    ],
)
def test_what_comes_in_the_first_quarter_does_not_count(samples, wanted):
    assert growth(samples) == wanted


def test_the_summary_names_every_process():
    result = Result(Counter(finished=3, dropped=1), 70, {"api": [60.2, 60.4], "child 0": [400.0, 401.6]})
    assert result.summary() == {
        "ended": {"finished": 3, "dropped": 1},
        "chunks": 70,
        "memory_mb": {
            "api": {"first": 60, "last": 60, "growth": 0.0},
            "child 0": {"first": 400, "last": 402, "growth": 0.0},
        },
    }
