"""The table of a comparison: a line per cell with the times of all series, then a line per ratio with its bar."""

from __future__ import annotations

from collections.abc import Iterator

from .bars import BARS, ENCODINGS, TASKS, Bar
from .rounds import Turns

_UNITS = {"prefill512": "s per prompt", "load": "s per load"}


def lines(turns: Turns, bars: tuple[Bar, ...] = BARS) -> Iterator[str]:
    """The whole table; cells and bars that were not measured are left out, and counted at the end."""
    for name, task in TASKS.items():
        cells = [(e, t) for e in ENCODINGS for t in (1, 2) if any(turns.median(name, e, t, s) for s in task.series)]
        if cells:
            unit, factor = (_UNITS[name], 1.0) if name in _UNITS else ("ms per step", 1e3)
            yield f"{name + ', ' + unit:30}" + "".join(f"{series:>11}" for series in task.series)
            for encoding, threads in cells:
                medians = (turns.median(name, encoding, threads, series) for series in task.series)
                shown = (f"{'-' if value is None else format(value * factor, '.2f'):>11}" for value in medians)
                yield f"  {encoding + ', ' + _count(threads):28}" + "".join(shown)
            yield ""
    yield from _bar_lines(turns, bars)


def _bar_lines(turns: Turns, bars: tuple[Bar, ...]) -> Iterator[str]:
    yield f"{'ratio of seconds':62} {'median':>7} {'min-max':>12} {'bar':>6}"
    met = missed = unknown = 0
    for bar in bars:
        ratio = turns.ratio(bar)
        if ratio is None:
            unknown += bar.least is not None
            continue
        name = f"{bar.task} {bar.encoding}, {_count(bar.threads)}: {bar.of} / {bar.by}"
        line = f"{name:62} {ratio.median:7.2f} {ratio.least:6.2f}-{ratio.most:.2f}"
        if bar.least is None:
            yield line
            continue
        is_met = ratio.median >= bar.least
        met, missed = met + is_met, missed + (not is_met)
        yield f"{line:83}{bar.least:6.2f} {'met' if is_met else 'MISSED'}"
    yield f"{met} bars met, {missed} missed, {unknown} not measured"


def _count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"
