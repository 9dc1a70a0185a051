"""Turns the fields of configuration sections into click options: name = flag, docstring = help, type = form.

Every option defaults to None, "not given", so that `resolve` alone knows the precedence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic.fields import FieldInfo

from ..cache.fields import Section, setting_of
from .field_kind import FieldKind
from .resolution import as_yaml, resolve

__all__ = ["as_yaml", "config_options", "resolve"]


def config_options[F: Callable[..., Any]](*sections: type[Section]) -> Callable[[F], F]:
    """Gives a click command an option for every field of `sections`, and --config-file and --print-config.

    The command receives `config_file: Path | None`, `print_config: bool`, and each field by its name with None, or
    () where a flag may be repeated, for "not given": what `resolve` takes as `given`.
    """
    options = [
        click.option(
            "--config-file",
            type=click.Path(path_type=Path),
            help="YAML file of settings, by their names with underscores; environment and flags win over it.",
        ),
        click.option("--print-config", is_flag=True, help="Print the resolved settings as YAML, and do nothing else."),
        *(option_of(name, field) for section in sections for name, field in section.model_fields.items()),
    ]

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def option_of(name: str, field: FieldInfo) -> Callable[[Any], Any]:
    """The click option of one field."""
    kind = FieldKind.of(name, field)
    declared = setting_of(name, field)
    flags = _flags(name, declared.flag if declared else "")
    settings: dict[str, Any] = {
        "default": None,
        "help": _help(field, kind),
        "hidden": declared.hidden if declared else False,
    }
    if kind.form == "bool":
        off = [f"--no-{flag.removeprefix('--')}" for flag in flags]
        return click.option("/".join((flags[0], off[0])), name, *_pairs(flags[1:], off[1:]), **settings)
    if kind.form == "choice":
        settings["type"] = click.Choice(kind.choices)
    elif kind.form == "list" and not kind.is_comma_separated:
        settings |= {"multiple": True, "type": click.Choice(kind.choices) if kind.choices else str}
    if not kind.choices:
        settings["metavar"] = kind.metavar
    return click.option(*flags, name, **settings)


def _flags(name: str, declared: str) -> list[str]:
    """The spellings of a flag: the declared one, and the field's own name."""
    own = "--" + name.replace("_", "-")
    return [own] if declared in ("", own) else [declared, own]


def _pairs(on: Sequence[str], off: Sequence[str]) -> list[str]:
    return [f"{yes}/{no}" for yes, no in zip(on, off, strict=True)]


def _help(field: FieldInfo, kind: FieldKind) -> str:
    """The first paragraph of the field's docstring, with the limits and the default behind it."""
    text = " ".join(inspect.cleandoc(field.description or "").split("\n\n")[0].split())
    notes = [kind.allowed] if kind.minimum or kind.maximum else []
    default = field.get_default(call_default_factory=False)
    if not field.is_required() and default not in (None, "", (), []) and "[default" not in text:
        notes.append(f"default: {_shown(default, kind)}")
    return f"{text}  [{'; '.join(notes)}]" if notes else text


def _shown(default: Any, kind: FieldKind) -> str:
    if kind.form == "bool":
        return "yes" if default else "no"
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default))
    return default.human_readable(decimal=True) if hasattr(default, "human_readable") else str(default)
