"""Types of fields that several routes take, exact in what they accept and in what /openapi.json says of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from ..openapi_bounds import OF_MODEL
from ..template_limits import MAX_OUTPUT_CHARS
from ..text_output import MAX_STOP_CHARS


def _whole(value: Any) -> Any:
    """JSON has one type of number, of which 1.0 is an integer."""
    return int(value) if type(value) is float and value.is_integer() else value


def _all_whole(values: Any) -> Any:
    # One pass in C over a long prompt, in place of a call for every token.
    return (
        [_whole(value) for value in values] if isinstance(values, list) and float in set(map(type, values)) else values
    )


AS_WHOLE, ALL_AS_WHOLE = BeforeValidator(_whole), BeforeValidator(_all_whole)
"""Stand behind the bounds of a number, or the description would lose them."""

Count = Annotated[int, Field(ge=0, le=2**31 - 1), AS_WHOLE]
PositiveCount = Annotated[int, Field(ge=1, le=2**31 - 1), AS_WHOLE]
AnswerCount = Annotated[int, Field(ge=0, le=2**31 - 1, json_schema_extra={OF_MODEL: "answer"}), AS_WHOLE]
"""Tokens of an answer that the context has to hold."""

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1, json_schema_extra={OF_MODEL: "token"})]
TokenPrompt = Annotated[list[TokenId], Field(min_length=1, json_schema_extra={OF_MODEL: "prompt"}), ALL_AS_WHOLE]

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Label = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)]

PromptText = Annotated[str, Field(max_length=MAX_OUTPUT_CHARS)]
"""As long as what a template may make of a conversation: cutting text into tokens takes a second for a megabyte."""

ModelName = Annotated[str, Field(max_length=4096)]
"""The served model's, which is also meant where no model is named."""


def _must_be_false(value: bool) -> bool:
    if value:
        raise ValueError("is only supported as false")
    return value


OnlyFalse = Annotated[bool, AfterValidator(_must_be_false), WithJsonSchema({"const": False})]
"""What may be declined and not asked for. A literal would take 0 for false."""

type Refused = None
"""The type of a field of the API that this server does not support: only null is taken."""
