"""Ratios of a comparison: taken within a round, of CPU time with one thread and of the clock's with more."""

from pathlib import Path

import pytest

from max.bench.bars import BARS, CONTEXT_ENCODINGS, ENCODINGS, TASKS, TWO_GIGABYTES_A_SECOND, Bar
from max.bench.comparison_table import lines
from max.bench.rounds import Turn, Turns

BAR = Bar("b1", "bfloat16", 1, "llama.cpp", "ours", 1.3)


def turns(series: str, wall: list[float], cpu: list[float] | None = None, threads: int = 1) -> list[Turn]:
    pairs = zip(wall, cpu or wall, strict=True)
    return [Turn("b1", "bfloat16", threads, series, at, w, c) for at, (w, c) in enumerate(pairs)]


def test_a_ratio_compares_turns_of_one_round() -> None:
    # By medians over all rounds it would be 1: the machine was twice as slow in the middle round.
    both = Turns(turns("llama.cpp", [3.0, 2.0, 6.0]) + turns("ours", [1.0, 2.0, 2.0]))
    ratio = both.ratio(BAR)
    assert ratio is not None
    assert (ratio.median, ratio.least, ratio.most) == (3.0, 1.0, 3.0)


def test_rounds_without_both_series_do_not_count() -> None:
    ratio = Turns(turns("llama.cpp", [3.0, 2.0]) + turns("ours", [1.0])).ratio(BAR)
    assert ratio is not None and ratio.median == 3.0
    assert Turns(turns("ours", [1.0])).ratio(BAR) is None


def test_one_thread_counts_its_own_time_and_two_the_clock() -> None:
    for threads, expected in ((1, 4.0), (2, 2.0)):
        both = turns("llama.cpp", [2.0], [4.0], threads) + turns("ours", [1.0], [1.0], threads)
        ratio = Turns(both).ratio(Bar("b1", "bfloat16", threads, "llama.cpp", "ours"))
        assert ratio is not None and ratio.median == expected


def test_a_cell_measured_again_replaces_all_its_rounds(tmp_path: Path) -> None:
    old = Turns(turns("ours", [1.0, 1.0, 1.0]) + turns("llama.cpp", [5.0]))
    new = old.replace(Turns(turns("ours", [2.0])))
    assert new.seconds("b1", "bfloat16", 1, "ours") == {0: 2.0}
    assert new.median("b1", "bfloat16", 1, "llama.cpp") == 5.0
    new.write(tmp_path / "turns.json")
    assert sorted(map(repr, Turns.read(tmp_path / "turns.json").all)) == sorted(map(repr, new.all))
    assert Turns.read(tmp_path / "none.json").all == []


@pytest.mark.parametrize(("theirs", "verdict"), [(1.3, "met"), (1.29, "MISSED")])
def test_the_table_says_whether_a_bar_is_met(theirs: float, verdict: str) -> None:
    table = list(lines(Turns(turns("llama.cpp", [theirs]) + turns("ours", [1.0])), (BAR,)))
    row = next(line for line in table if "llama.cpp / ours" in line)
    assert row.split()[-1] == verdict and f"{theirs:.2f}" in row
    assert table[-1] == f"{int(verdict == 'met')} bars met, {int(verdict != 'met')} missed, 0 not measured"


def test_what_was_not_measured_is_counted_and_not_shown() -> None:
    table = list(lines(Turns([]), (BAR, Bar("b1", "bfloat16", 1, "kernels", "ours"))))
    assert table[-1] == "0 bars met, 0 missed, 1 not measured" and len(table) == 2


def test_every_bar_compares_series_that_its_task_measures() -> None:
    assert len(set(BARS)) == len(BARS)
    for bar in BARS:
        series = {*TASKS[bar.task].series, TWO_GIGABYTES_A_SECOND}
        assert {bar.of, bar.by} <= series and bar.encoding in ENCODINGS
        assert bar.task != "context4096" or bar.encoding in CONTEXT_ENCODINGS
