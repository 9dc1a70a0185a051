"""Short tables and figures for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click

# Laying out a row takes rich half a millisecond; a long listing is scrolled through or piped anyway.
_RICH_ROWS = 60


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Prints rows under their headings on stdout: fitted to a terminal, plain elsewhere and where they are many.

    right: headings of columns of figures, which line up at their ends
    """
    if sys.stdout.isatty() and len(rows) <= _RICH_ROWS:
        _print_rich(columns, rows, right)
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = zip(row, widths, columns, strict=True)
        line = "  ".join(cell.rjust(w) if name in right else cell.ljust(w) for cell, w, name in cells)
        click.echo(line.rstrip())


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in ("key", *right))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def size(count: float) -> str:
    """Bytes in the largest decimal unit that leaves at least one of it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError(count)


def ago(then: float) -> str:
    """How long ago a time was, in one unit."""
    seconds = max(0.0, time.time() - then)
    for length, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
