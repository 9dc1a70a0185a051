"""Progress of long work on stderr: a bar on a terminal, elsewhere a line per phase and one every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


_LINE_EVERY_S = 10.0


class ProgressBar:
    """Takes (phase, item, done, total) and shows it; nothing at all when no work is reported."""

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._told = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, phase: str, item: str, done: int, total: int) -> None:
        if phase != self._phase:
            self._begin(phase, item, total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total or None, item=item)
        elif total and time.monotonic() - self._told >= _LINE_EVERY_S:
            self._tell(f"{phase}: {100 * done // total} %")

    def close(self) -> None:
        """Clears the bar, so that results and statistics stand alone."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _begin(self, phase: str, item: str, total: int) -> None:
        self._phase = phase
        if not self._on_terminal:
            self._tell(_line(phase, item, total))
            return
        self.close()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        item_column = TextColumn("{task.fields[item]}")
        columns = (TextColumn("{task.description}"), BarColumn(), item_column, TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(phase, total=total or None, item=item)
        self._bar.start()

    def _tell(self, line: str) -> None:
        click.echo(line, err=True)
        self._told = time.monotonic()


def _line(phase: str, item: str, total: int) -> str:
    if phase == "wait":
        return f"waiting for {item}, which makes the same artifact"
    count = "" if not total else f" {total / 1e6:,.0f} MB" if phase == "prepare weights" else f" {total} items"
    return f"{phase}:{count} ..."
