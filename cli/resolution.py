"""Resolves settings: default < YAML file < environment < flag, then checks them once, as sections."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .. import ConfigError
from ..cache.fields import Section, setting_of
from .commands import COMMANDS
from .field_kind import FieldKind
from .planned import planned_error
from .yaml_file import read_settings_file


@dataclass(frozen=True)
class _Given:
    """A value, and where it was given, in words that a user recognises."""

    value: Any
    origin: str


class Settings(tuple[Section, ...]):
    """Resolved sections in the order asked for; `of` finds one by its class."""

    __slots__ = ()

    def of[S: Section](self, section_class: type[S]) -> S:
        """The section of exactly this class, which must be among those resolved."""
        found = next(section for section in self if type(section) is section_class)
        assert isinstance(found, section_class)
        return found


def resolve(
    section_classes: Sequence[type[Section]],
    given: Mapping[str, Any],
    config_file: Path | None,
    environ: Mapping[str, str],
    *,
    command: str = "",
) -> Settings:
    """The sections in force, in the order of `section_classes`.

    given: field -> value of its flag; None and () mean that the flag was not given
    config_file: YAML with fields at its top, or under `<command>_config`, which wins over the top
    environ: MAX_<FIELD>, and the variable that a field names for itself; empty ones count as unset
    Raises: ConfigError for an unknown or planned key, and for every wrong value, naming what is allowed.
    """
    fields = {name: section for section in section_classes for name in section.model_fields}
    assert len(fields) == sum(len(section.model_fields) for section in section_classes), "two fields share a name"
    assert given.keys() <= fields.keys(), f"no fields: {given.keys() - fields.keys()}"
    values: dict[str, _Given] = {}
    if config_file is not None:
        values |= _from_file(config_file, fields, command)
    values |= _from_environment(fields, environ)
    values |= _from_flags(fields, given)
    return Settings(_checked(section, values) for section in section_classes)


def as_yaml(sections: Iterable[Section]) -> str:
    """The settings of `sections` as YAML that --config-file accepts."""
    settings = {name: value for section in sections for name, value in section.model_dump(mode="json").items()}
    return yaml.safe_dump(settings, sort_keys=False)


def _from_file(path: Path, fields: Mapping[str, type[Section]], command: str) -> dict[str, _Given]:
    content = read_settings_file(path)
    settings = {key: value for key, value in content.items() if not _is_nested(key)}
    nested = content.get(_nested_key(command)) if command else None
    if nested is not None:
        if not isinstance(nested, dict):
            raise ConfigError(
                f"{path}: {_nested_key(command)} holds no settings", "Indent `name: value` lines under it."
            )
        settings |= nested
    for key in settings:
        if key not in fields:
            raise _unknown_key(key, path, fields)
    return {key: _Given(_split(value, key, fields[key]), f"{key} in {path}") for key, value in settings.items()}


def _nested_key(command: str) -> str:
    return command.replace("-", "_") + "_config"


def _is_nested(key: str) -> bool:
    """Whether `key` opens the settings of one command; those of other commands are passed over."""
    return any(key == _nested_key(command) for command in COMMANDS)


def _unknown_key(key: str, path: Path, fields: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(key.replace("-", "_"), list(fields), n=1, cutoff=0.6)
    # A setting with dashes is a slip of spelling, even where other commands only plan for it.
    if key.replace("-", "_") not in near and (planned := planned_error(key, f"{key} in {path}")):
        return planned
    hint = f"Did you mean {near[0]}?" if near else "`--print-config` prints all names."
    return ConfigError(f"{path}: unknown setting {key}", hint)


def _from_environment(fields: Mapping[str, type[Section]], environ: Mapping[str, str]) -> dict[str, _Given]:
    found: dict[str, _Given] = {}
    for name, section in fields.items():
        declared = setting_of(name, section.model_fields[name])
        for variable in (f"MAX_{name.upper()}", declared.environment if declared else None):
            if variable and environ.get(variable):
                text = environ[variable]
                kind = FieldKind.of(name, section.model_fields[name])
                value = text.split(",") if kind.form == "list" else text
                found[name] = _Given(value, variable)
                break
    return found


def _from_flags(fields: Mapping[str, type[Section]], given: Mapping[str, Any]) -> dict[str, _Given]:
    found: dict[str, _Given] = {}
    for name, value in given.items():
        if value is None or value == ():
            continue
        declared = setting_of(name, fields[name].model_fields[name])
        flag = declared.flag if declared else "--" + name.replace("_", "-")
        found[name] = _Given(_split(value, name, fields[name]), flag)
    return found


def _split(value: Any, name: str, section: type[Section]) -> Any:
    """Text for a list: numbers stand between commas, any other text is one item."""
    kind = FieldKind.of(name, section.model_fields[name])
    if kind.form != "list" or not isinstance(value, str):
        return value
    return [item.strip() for item in value.split(",")] if kind.is_comma_separated else [value]


def _checked(section: type[Section], values: Mapping[str, _Given]) -> Section:
    try:
        return section.model_validate({name: values[name].value for name in section.model_fields if name in values})
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False, include_context=False)
        messages = [_message(error, section, values) for error in errors]
        allowed = dict.fromkeys(_allowed(error, section) for error in errors)
        raise ConfigError("; ".join(messages), " ".join(text for text in allowed if text)) from invalid


def _message(error: ErrorDetails, section: type[Section], values: Mapping[str, _Given]) -> str:
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not error["loc"]:
        return reason
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{_flag(section, name)} is required"
    given = values.get(name)
    return f"{given.origin if given else _flag(section, name)}: {error['input']!r} {reason}"


def _allowed(error: ErrorDetails, section: type[Section]) -> str:
    if not error["loc"]:
        return "Change one of these settings."
    name = str(error["loc"][0])
    return f"{_flag(section, name)} takes {FieldKind.of(name, section.model_fields[name]).allowed}."


def _flag(section: type[Section], name: str) -> str:
    declared = setting_of(name, section.model_fields[name])
    return declared.flag if declared else "--" + name.replace("_", "-")
