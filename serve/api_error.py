"""Errors as the OpenAI API shows them: a status, and one JSON object with message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from pydantic import BaseModel
from starlette.responses import Response

from .. import MaxError
from .engine_port import EngineUnavailable

RETRY_AFTER_S = 1
LOADING_RETRY_AFTER_S = 2


class ErrorDetail(BaseModel):
    """What went wrong and what to do; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        detail = {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}
        return {"error": detail}

    def response(self) -> Response:
        """The answer itself."""
        return Response(msgspec.json.encode(self.body), self.status, self.headers, "application/json")


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def from_max_error(error: MaxError, param: str | None = None) -> ApiError:
    """The answer that tells a client of `error`: 400 for its own mistakes, 429 when there is no room, else 500."""
    text = " ".join(part for part in (_sentence(error.message), error.hint) if part)
    if error.kind == "user":
        return ApiError(400, text, code="invalid_value", param=param)
    if isinstance(error, EngineUnavailable):
        return ApiError(503, text, code="unavailable", headers={"Retry-After": str(LOADING_RETRY_AFTER_S)})
    if error.kind == "capacity":
        return ApiError(429, text, code="no_capacity", headers={"Retry-After": str(RETRY_AFTER_S)})
    return ApiError(500, text, code="engine_error")


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def not_ready(state: Literal["starting", "draining", "restarting", "failed"] | str, what: str = "") -> ApiError:
    """503 with the time after which to ask again."""
    reason = {
        "starting": "The model is loading",
        "restarting": "The engine is restarting",
        "draining": "The server is shutting down",
        "failed": "The engine cannot start",
    }[state]
    message = f"{reason}: {what}." if what else f"{reason}."
    return ApiError(503, message, code=state, headers={"Retry-After": str(LOADING_RETRY_AFTER_S)})


def no_such_model(name: str, served: str) -> ApiError:
    """404 as the OpenAI API has it."""
    shown = name if len(name) <= 200 else name[:200] + "..."
    return ApiError(
        404, f"The model {shown!r} does not exist; this server has {served!r}.", code="model_not_found", param="model"
    )
