"""Around every request: its id, its line in the log, its count in the metrics, and an answer when a route fails."""

from __future__ import annotations

import logging
import re
import uuid
from time import perf_counter
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_error import ApiError
from .event_stream import ClientGone
from .metrics import Metrics

logger = logging.getLogger(__name__)

_ID = re.compile(rb"[\x21-\x7e]{1,128}")
CLIENT_GONE = 499
"""The status under which a request counts whose client left; nobody sees it."""


def note(request: Request, **facts: Any) -> None:
    """Adds facts to the log line of a request; those that are None are left out."""
    request.scope["noted"].update({name: value for name, value in facts.items() if value is not None})


class RequestLog:
    """ASGI middleware around all routes; nothing that they raise goes beyond it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = perf_counter(), 0
        request_id = _request_id(scope)
        noted: dict[str, Any] = {}
        scope["noted"] = noted

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            status = CLIENT_GONE
        except Exception:
            logger.exception("request %s failed", request_id.decode())
            if status == 0:
                fault = ApiError(500, "The server failed; its log says how.", code="internal_error")
                await fault.response()(scope, receive, send_with_id)
        finally:
            seconds = perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched").replace(":path", "")
            self._metrics.request_ended(route, status, seconds)
            # Probes come every second and say nothing.
            level = logging.DEBUG if route in _QUIET else logging.INFO
            if logger.isEnabledFor(level):
                facts = {"id": request_id.decode(), "method": scope["method"], "path": scope["path"], "status": status}
                logger.log(level, "request", extra={"facts": {**facts, "ms": round(seconds * 1e3, 1), **noted}})


_QUIET = {"/health", "/v1/health", "/livez", "/readyz", "/startupz", "/ping", "/metrics", "/status"}


def _request_id(scope: Scope) -> bytes:
    """The client's own id, where it can stand in a header and a log line, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return value
    return f"req_{uuid.uuid4().hex}".encode()
