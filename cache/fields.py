"""Settings declared once: type, default, help and whether the value changes compiled code.

A section is a frozen pydantic model; the docstring under a field is its help text, its name is its flag
(`kv_cache_page_size` is `--kv-cache-page-size`). Every field is classified, so that no field that changes the compiled
code can be forgotten in the key.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from .canonical import plain


@dataclass(frozen=True)
class Setting:
    """What a field says about itself beyond its type, default and help."""

    compiles: bool
    flag: str
    choices: tuple[str, ...]
    hidden: bool
    environment: str | None


def setting(
    default: Any = ...,
    *,
    compiles: bool,
    flag: str | None = None,
    choices: Sequence[str] = (),
    hidden: bool = False,
    environment: str | None = None,
    default_factory: Callable[[], Any] | None = None,
    **limits: Any,
) -> Any:
    """Declares a field of a `Section`.

    compiles: whether the value changes compiled code, and so belongs to the key
    flag: the flag's name where it is not the field's name with dashes, such as "--model"
    choices: the only values allowed; for a field that is not a `Literal`
    hidden: left out of the help text
    environment: the variable that sets the field besides MAX_<NAME>
    limits: pydantic's constraints, such as `ge`, `le`, `gt`, `lt`, `min_length` and `pattern`
    """
    extra = {
        "compiles": compiles,
        "flag": flag,
        "choices": list(choices),
        "hidden": hidden,
        "environment": environment,
    }
    if default_factory is not None:
        return Field(default_factory=default_factory, json_schema_extra=extra, **limits)
    return Field(default, json_schema_extra=extra, **limits)


def setting_of(name: str, field: FieldInfo) -> Setting | None:
    """Reads back what `setting` recorded in a field called `name`; None for a field declared in another way."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or not isinstance(extra.get("compiles"), bool):
        return None
    recorded: dict[str, Any] = dict(extra)
    return Setting(
        compiles=recorded["compiles"],
        flag=recorded["flag"] or "--" + name.replace("_", "-"),
        choices=tuple(recorded["choices"]),
        hidden=recorded["hidden"],
        environment=recorded["environment"],
    )


class Section(BaseModel):
    """The base of all sections: frozen, complete, and without room for unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _is_a_choice(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        declared = setting_of(name, cls.model_fields[name])
        if declared is not None and declared.choices and value is not None:
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if str(item) not in declared.choices:
                    raise ValueError(f"must be one of {', '.join(declared.choices)}")
        return value


def compile_factors(*sections: Section) -> dict[str, Any]:
    """Returns name -> JSON value of every setting that changes compiled code.

    A field that nobody classified counts as one that does: the worst outcome is a needless compilation.
    """
    factors: dict[str, Any] = {}
    for section in sections:
        values = section.model_dump(mode="json")
        for name, field in type(section).model_fields.items():
            declared = setting_of(name, field)
            if declared is None or declared.compiles:
                assert name not in factors, f"two sections have a field {name}"
                factors[name] = plain(values[name], name)
    return factors


def unclassified(section_class: type[Section]) -> list[str]:
    """Returns the fields of a section of which nobody said whether they change compiled code."""
    return [name for name, field in section_class.model_fields.items() if setting_of(name, field) is None]
