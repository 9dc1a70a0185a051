"""Reads the body of a request into its schema, and says of a wrong one which field is wrong and how."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from .api_error import ApiError

logger = logging.getLogger(__name__)

_OPENING = re.compile("^(Value error, |Input |List |String |Dictionary )")
"""Words of pydantic's that stand where the name of the field does here."""

_JSON_TYPES = ("application/json", "")


class Schema(BaseModel):
    """The base of all request bodies: exact types, no unknown fields, finite numbers."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class Limits(Protocol):
    """What a server allows; read from its configuration."""

    @property
    def max_request_size(self) -> int: ...

    @property
    def allow_extra_request_fields(self) -> bool: ...


async def read_body[S: Schema](request: Request, schema: type[S], limits: Limits) -> S:
    """The body of `request` as a `schema`. Raises ApiError 400, 413 or 415."""
    _check_type(request.headers)
    content = await _read(request, limits.max_request_size)
    if not content:
        raise ApiError(400, "The request has no body; send a JSON object.", code="invalid_json")
    try:
        data = from_json(content, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, "The body is not a JSON object.", code="invalid_type")
    if limits.allow_extra_request_fields:
        _drop_extra(data, schema)
    try:
        return schema.model_validate(data)
    except ValidationError as invalid:
        raise _explained(invalid, data, limits) from invalid
    except RecursionError as error:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from error


def _check_type(headers: Headers) -> None:
    """Refuses bodies of other types: a web page can post those to a local server without asking."""
    sent = headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent not in _JSON_TYPES and not sent.endswith("+json"):
        raise ApiError(
            415, f"The body is {sent[:80]}; send it with Content-Type: application/json.", code="invalid_content_type"
        )


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
        raise _too_large(limit)
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                raise _too_large(limit)
    except ClientDisconnect as gone:
        raise ApiError(400, "The body ended early.", code="invalid_json") from gone
    return bytes(content)


def _too_large(limit: int) -> ApiError:
    # The rest of the body stays unread, so the connection cannot carry another request.
    return ApiError(
        413,
        f"The body has more than the {limit:,} bytes that --max-request-size allows.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _drop_extra(data: dict[str, Any], schema: type[Schema]) -> None:
    if extra := [name for name in data if name not in schema.model_fields]:
        logger.warning("dropped unknown fields of a request: %s", ", ".join(name[:60] for name in extra[:20]))
        for name in extra:
            del data[name]


def _explained(invalid: ValidationError, data: dict[str, Any], limits: Limits) -> ApiError:
    """One answer for all that is wrong with the first wrong field.

    A union reports what each of its members misses; the one that goes deepest is what the client meant.
    """
    errors = invalid.errors(include_url=False, include_input=False)
    paths = [_path(error, data) for error in errors]
    first = max((path for path in paths if path.startswith(paths[0])), key=lambda path: len(re.findall(r"[.[]", path)))
    own = [error for error, path in zip(errors, paths, strict=True) if path == first]
    codes = {error["type"] for error in own}
    if "extra_forbidden" in codes:
        hint = "" if limits.allow_extra_request_fields or "." in first else "; --allow-extra-request-fields drops such"
        return ApiError(400, f"{_shown(first)} is not a known field{hint}.", code="unknown_parameter", param=first)
    if "none_required" in codes:
        return ApiError(
            400, f"{_shown(first)} is not supported by this server.", code="unsupported_parameter", param=first
        )
    if "missing" in codes:
        return ApiError(400, f"{_shown(first)} is required.", code="missing_required_parameter", param=first)
    reasons = dict.fromkeys(_reason(error) for error in own)
    return ApiError(400, f"{_shown(first)} {' or '.join(reasons)}.", code="invalid_value", param=first or None)


def _reason(error: ErrorDetails) -> str:
    text = _OPENING.sub("", error["msg"]).replace(" after validation", "").rstrip(".")
    return text if len(text) <= 300 else text[:300] + "..."


def _shown(path: str) -> str:
    return f"'{path}'" if path else "The body"


def _path(error: ErrorDetails, data: Any) -> str:
    """The place of an error as a client writes it, messages[0].content: without the names of union members."""
    path, here = "", data
    names: Sequence[int | str] = error["loc"]
    for position, name in enumerate(names):
        is_last_missing = position == len(names) - 1 and error["type"] == "missing"
        if isinstance(name, str) and (is_last_missing or (isinstance(here, dict) and name in here)):
            shown = name if len(name) <= 60 else name[:60] + "..."
            path += f".{shown}" if path else shown
            here = here.get(name) if isinstance(here, dict) else None
        elif isinstance(name, int) and isinstance(here, list) and name < len(here):
            path += f"[{name}]"
            here = here[name]
    return path
