"""What a field of a section is to a command line: its form, the word for its value, and what is allowed."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from ..cache.fields import setting_of

Form = Literal["bool", "choice", "scalar", "list"]


@dataclass(frozen=True)
class FieldKind:
    """The form of a field, read off its type."""

    form: Form
    type: type
    """The type of a value, or of an item of a list."""
    choices: tuple[str, ...] = ()
    minimum: str = ""
    maximum: str = ""

    @staticmethod
    def of(name: str, field: FieldInfo) -> FieldKind:
        """Reads the annotation and limits of `field`; None beside another type only says that it may be left out."""
        declared = setting_of(name, field)
        inner = _without_none(field.annotation)
        is_list = get_origin(inner) in (list, tuple, set, frozenset)
        item = _without_none(get_args(inner)[0]) if is_list else inner
        choices = declared.choices if declared else ()
        if get_origin(item) is Literal:
            choices, item = tuple(map(str, get_args(item))), str
        value_type = item if isinstance(item, type) else str
        minimum, maximum = _limits(field)
        form: Form = "scalar"
        if is_list:
            form = "list"
        elif choices:
            form = "choice"
        elif value_type is bool:
            form = "bool"
        return FieldKind(form, value_type, choices, minimum, maximum)

    @property
    def is_comma_separated(self) -> bool:
        """Whether one flag takes all items: numbers hold no commas, text may."""
        return self.form == "list" and self.type in (int, float)

    @property
    def metavar(self) -> str:
        """The word for a value in the help text."""
        word = {int: "INTEGER", float: "NUMBER", Path: "PATH", ByteSize: "SIZE"}.get(self.type, "TEXT")
        return f"{word},..." if self.is_comma_separated else word

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        if self.choices:
            return f"{'any' if self.form == 'list' else 'one'} of {', '.join(self.choices)}"
        word = {
            bool: "true or false",
            int: "an integer",
            float: "a number",
            Path: "a path",
            ByteSize: "a size such as 512MB or 20GB",
        }.get(self.type, "text")
        if self.form == "list":
            word += ", or several" + (" separated by commas" if self.is_comma_separated else "")
        return " ".join(part for part in (word, self.minimum, self.maximum) if part)


def _without_none(annotation: Any) -> Any:
    """`annotation` without None and without the extras of Annotated."""
    if get_origin(annotation) is typing.Annotated:
        return _without_none(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _without_none(members[0]) if len(members) == 1 else str
    return annotation


def _limits(field: FieldInfo) -> tuple[str, str]:
    minimum = maximum = ""
    for limit in [*field.metadata, *_inner_metadata(field.annotation)]:
        match limit:
            case annotated_types.Ge():
                minimum = f"of at least {limit.ge}"
            case annotated_types.Gt():
                minimum = f"above {limit.gt}"
            case annotated_types.Le():
                maximum = f"of at most {limit.le}"
            case annotated_types.Lt():
                maximum = f"below {limit.lt}"
            case _:
                continue
    return minimum, f"and {maximum}" if minimum and maximum else maximum


def _inner_metadata(annotation: Any) -> list[Any]:
    """The extras of Annotated members of a union or list, where a limit may stand too."""
    if get_origin(annotation) is typing.Annotated:
        extras = get_args(annotation)[1:]
        return [limit for extra in extras for limit in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
    return [extra for member in get_args(annotation) for extra in _inner_metadata(member)]
