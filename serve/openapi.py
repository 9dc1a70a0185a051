"""The description of the API at /openapi.json: bodies that the routes read themselves, and the one shape of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .api_error import ErrorBody
from .engine_port import EnginePort
from .messages import Ready
from .openapi_bounds import bounded

_REF = "#/components/schemas/{model}"
_DESCRIBED: list[tuple[type[BaseModel], bool]] = [(ErrorBody, False)]
_STATUSES = {
    400: "The request is wrong; `param` names the field",
    404: "There is no such model",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "There is no room now; ask again after Retry-After",
    500: "The engine failed",
    503: "The model is loading, or the server is shutting down; ask again after Retry-After",
}


def describes(
    body: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    *,
    chunk: type[BaseModel] | None = None,
    media_type: str = "application/json",
) -> dict[str, Any]:
    """Keywords for a route that reads and writes JSON itself: its body, its answer, and its errors.

    chunk: what each event holds where the answer can be streamed
    """
    extra: dict[str, Any] = {"responses": {}}
    if body is not None:
        _DESCRIBED.append((body, True))
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    success: dict[str, Any] = {"description": "The answer", "content": {}}
    if answer is not None:
        _DESCRIBED.append((answer, False))
        success["content"]["application/json"] = {"schema": _ref(answer)}
    else:
        success["content"][media_type] = {"schema": {}}
    if chunk is not None:
        _DESCRIBED.append((chunk, False))
        success["content"]["text/event-stream"] = {"schema": _event(chunk)}
    errors = {
        str(status): {"description": text, "content": {"application/json": {"schema": _ref(ErrorBody)}}}
        for status, text in _STATUSES.items()
    }
    extra["responses"] = {"200": success, **errors}
    return {"response_model": None, "openapi_extra": extra}


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """An event of a stream: a chunk, the error that ends the stream, or the mark of its end."""
    content = {"anyOf": [_ref(chunk), _ref(ErrorBody)]}
    data = {"anyOf": [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": content}]}
    return {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"type": "string", **data}},
        "required": ["data"],
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def install(app: FastAPI, model_name: str, port: EnginePort) -> None:
    """Makes `app.openapi` complete with the schemas that the routes refer to, in the bounds of the one model there is.

    port: tells the bounds once the engine is ready; the document is made anew then
    """
    plain = app.openapi
    shown: tuple[Ready | None, dict[str, Any]] | None = None

    def complete() -> dict[str, Any]:
        nonlocal shown
        if shown is None or shown[0] is not port.ready:
            ready = port.ready
            shown = ready, bounded(_completed(plain(), model_name), ready)
        return shown[1]

    app.openapi = complete


def _completed(document: dict[str, Any], model_name: str) -> dict[str, Any]:
    modes = [(model, "validation" if is_body else "serialization") for model, is_body in _DESCRIBED]
    _, schemas = models_json_schema(modes, ref_template=_REF)  # pyright: ignore[reportArgumentType]
    components = document.setdefault("components", {}).setdefault("schemas", {})
    components.update(schemas["$defs"])
    for model, is_body in _DESCRIBED:
        if is_body and "model" in model.model_fields:
            components[model.__name__]["properties"]["model"] = {"enum": [model_name, None]}
    # The framework's own answer to a wrong request, which no route here gives.
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    return document
