"""Rules between the fields of a request, as /openapi.json tells them to clients; the routes check them on their own."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

_NONE = {"type": "null"}


def between_fields(*rules: dict[str, Any]) -> ConfigDict:
    """What a schema holds for all these rules to be told; bodies are not checked by it."""
    return ConfigDict(json_schema_extra={"allOf": list(rules)})


def needs(field: str, switch: str) -> dict[str, Any]:
    """`field` is left out, or `switch` is true."""
    return _either({field: _NONE}, {switch: {"const": True}})


def zero_needs_echo() -> dict[str, Any]:
    """No tokens are asked for only where the prompt is shown, and not in a stream."""
    some = {"max_tokens": {"anyOf": [_NONE, {"minimum": 1}]}}
    return _either(some, {"echo": {"const": True}, "stream": {"enum": [False, None]}}, needed=["echo"])


def best_of_one() -> dict[str, Any]:
    """`best_of` equals `n`, which a schema cannot say: told is the only value that is of use."""
    return _either({"best_of": _NONE}, {"best_of": {"const": 1}, "n": {"enum": [1, None]}}, needed=[])


def _either(first: dict[str, Any], second: dict[str, Any], *, needed: list[str] | None = None) -> dict[str, Any]:
    required = list(second) if needed is None else needed
    return {"anyOf": [{"properties": first}, {"properties": second, "required": required}]}
