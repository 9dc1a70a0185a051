"""Times taken in rounds, in which every engine has its turn, and the ratios of a round's times."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from .bars import Bar


@dataclass(frozen=True)
class Turn:
    """One series in one round: median seconds of a step on the clock, and of all threads of the process together."""

    task: str
    encoding: str
    threads: int
    series: str
    round: int
    wall: float
    cpu: float

    @property
    def seconds(self) -> float:
        """What counts: of a pinned thread its own time, which neighbours disturb least; of several the clock's."""
        return self.cpu if self.threads == 1 else self.wall


@dataclass(frozen=True)
class Ratio:
    """A bar's ratio over the rounds."""

    median: float
    least: float
    most: float


class Turns:
    """All turns of a run, by cell."""

    def __init__(self, turns: list[Turn]) -> None:
        self.all = turns

    def seconds(self, task: str, encoding: str, threads: int, series: str) -> dict[int, float]:
        """Seconds by round; empty where nothing was measured."""
        cell = (task, encoding, threads, series)
        return {turn.round: turn.seconds for turn in self.all if _cell(turn) == cell}

    def median(self, task: str, encoding: str, threads: int, series: str) -> float | None:
        found = self.seconds(task, encoding, threads, series)
        return statistics.median(found.values()) if found else None

    def ratio(self, bar: Bar) -> Ratio | None:
        """The bar's ratio in the rounds that have both of its series; None if there are none."""
        of = self.seconds(bar.task, bar.encoding, bar.threads, bar.of)
        by = self.seconds(bar.task, bar.encoding, bar.threads, bar.by)
        found = [of[at] / by[at] for at in sorted(of.keys() & by.keys())]
        return Ratio(statistics.median(found), min(found), max(found)) if found else None

    def replace(self, newer: Turns) -> Turns:
        """These turns, with those of every cell that was measured again in place of the old ones."""
        cells = {_cell(turn) for turn in newer.all}
        return Turns([turn for turn in self.all if _cell(turn) not in cells] + newer.all)

    def write(self, file: Path) -> None:
        rows = sorted(self.all, key=lambda turn: (_cell(turn), turn.round))
        lines = ",\n".join(json.dumps(asdict(turn)) for turn in rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")

    @staticmethod
    def read(file: Path) -> Turns:
        """What `write` wrote; nothing where there is no file."""
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        return Turns([Turn(**row) for row in rows])


def _cell(turn: Turn) -> tuple[str, str, int, str]:
    return (turn.task, turn.encoding, turn.threads, turn.series)
