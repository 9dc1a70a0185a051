"""Writes docs/cli.md from the commands themselves: `python -m max.cli.document > docs/cli.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import groupby

import click

from .main import group
from .planned import DECLINED, PLANNED

_HEAD = """\
# The command line

Written by `python -m max.cli.document`; a test compares this file with the commands.

A setting has a default; a YAML file (`--config-file`) wins over it, the environment over the file, a flag over all.
Its name is the same everywhere: `--max-length` is `max_length` in YAML and `MAX_MAX_LENGTH` in the environment.
`--print-config` prints the settings in force, in a form that `--config-file` takes.

Results go to stdout, everything else to stderr. An error is two lines, what happened and what to do, and an exit code:
1 an error of max itself, 2 a mistake in what was asked, 3 no room now, 130 interrupted.
"""


def document() -> str:
    """All commands and their options as Markdown, in the order of `max --help`."""
    root = group.make_context("max", [], resilient_parsing=True)
    parts = [_HEAD, *_options(root)]
    taken: set[str] = set()
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        assert command is not None, f"max {name} is in the table of commands and cannot be had"
        parts += _sections(command, click.Context(command, info_name=name, parent=root))
        taken |= {flag for parameter in command.params if not _is_hidden(parameter) for flag in parameter.opts}
    return "\n".join([*parts, *_planned(taken)])


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """A command's own section, and those of the commands in it."""
    yield f"## {context.command_path}\n"
    yield from _description(command)
    yield from _options(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None, f"{name} is in the table of {context.command_path} and cannot be had"
            yield from _sections(inner, click.Context(inner, info_name=name, parent=context))


def _description(command: click.Command) -> Iterator[str]:
    """The help text; what click is told not to wrap (a paragraph that opens with \\b) is shown as it is."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):
            yield "\n".join(f"    {line}" for line in paragraph.splitlines()[1:]) + "\n"
        else:
            yield paragraph + "\n"


def _options(context: click.Context) -> Iterator[str]:
    records = [record for option in context.command.get_params(context) if (record := option.get_help_record(context))]
    if records:
        rows = [f"| `{_cell(syntax)}` | {_cell(text)} |" for syntax, text in records]
        yield "\n".join(["| option | meaning |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _is_hidden(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Option) and parameter.hidden


def _planned(taken: set[str]) -> Iterator[str]:
    yield "## Planned\n"
    yield "Options of other MAX command lines that are refused by name until what they need is there:\n"
    missing = [planned for planned in PLANNED.values() if f"--{planned.name}" not in taken]
    for feature, options in groupby(missing, key=lambda planned: planned.feature):
        yield f"- {feature}: {', '.join(f'`--{option.name}`' for option in options)}"
    yield "\nAnd those that wait for nothing:\n"
    for option in DECLINED.values():
        yield f"- `--{option.name}`, {option.feature}. {option.declined}"
    yield ""


if __name__ == "__main__":
    click.echo(document(), nl=False)
