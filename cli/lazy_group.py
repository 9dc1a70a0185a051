"""Groups of commands that are imported to be run or to show their own help, and not before."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import click

from .commands import CommandEntry


class LazyGroup(click.Group):
    """A group over a table of commands."""

    def __init__(self, *, table: Mapping[str, CommandEntry], package: str, **settings: Any) -> None:
        """table: the commands by name; their modules are relative to `package`."""
        super().__init__(**settings)
        self.table, self.package = table, package

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.table.get(cmd_name)
        if entry is None:
            return None
        return getattr(importlib.import_module(entry.module, self.package), entry.attribute)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.table and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.table, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"no such command: {name}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.table[name].summary) for name in self.list_commands(ctx)])
