"""What the served model adds to the description of the API: its name, the ids of its vocabulary, its context."""

from __future__ import annotations

from typing import Any

from .messages import Ready

OF_MODEL = "x-of-model"
"""Marks a schema whose bounds are the model's. Its value says which, and no client sees it."""

_KEY_CHARS = 10  # of a token id in logit_bias


def bounded(schema: Any, ready: Ready | None) -> Any:
    """A copy in which marked schemas have the bounds of the model. ready: None where they are not known yet"""
    if isinstance(schema, list):
        return [bounded(item, ready) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: bounded(value, ready) for name, value in schema.items() if name != OF_MODEL}
    kind = schema.get(OF_MODEL)
    return inner if kind is None or ready is None else inner | _bounds(kind, ready)


def _bounds(kind: str, ready: Ready) -> dict[str, Any]:
    match kind:
        case "token":
            return {"maximum": ready.vocab_size - 1}
        case "prompt":
            return {"maxItems": ready.max_length - 1}
        case "answer":
            return {"maximum": ready.max_length - 1}
        case "bias":
            pattern = f"^0*({decimals_up_to(ready.vocab_size - 1)})$"
            return {"propertyNames": {"pattern": pattern, "maxLength": _KEY_CHARS}}
    raise AssertionError(f"unknown mark {kind!r}")


def decimals_up_to(largest: int) -> str:
    """A regular expression of the decimals from 0 to `largest`, which JSON Schema has no other words for in a key."""
    digits = str(largest)
    shorter = [f"[0-9]{{1,{len(digits) - 1}}}"] if len(digits) > 1 else []
    smaller = [
        f"{digits[:place]}[0-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if (rest := len(digits) - place - 1) else "")
        for place, digit in enumerate(digits)
        if digit != "0"
    ]
    return "|".join([*shorter, *smaller, digits])
