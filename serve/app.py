"""The HTTP application: routes over an engine and a text side, with errors in one shape everywhere."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import MaxError, __version__
from . import health, openapi, operation, page
from .api_error import ApiError, from_max_error
from .openai import chat, completions, models, responses, tokens
from .operation import Latest
from .request_log import RequestLog
from .service import Service

_ROUTERS = (chat, completions, responses, models, tokens, health, operation, page)


def create_app(service: Service) -> FastAPI:
    """The application of one API process."""
    app = FastAPI(
        title="max",
        version=__version__,
        description="An OpenAI-compatible server of one language model.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.latest = Latest()
    app.state.latest.watch(service.port)
    for module in _ROUTERS:
        app.include_router(module.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(MaxError, _max_error)
    app.add_exception_handler(HTTPException, _http_error)
    openapi.install(app, service.model_name, service.port)
    app.add_middleware(RequestLog, service.metrics)
    return app


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _max_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, MaxError)
    return from_max_error(error).response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Routes and methods that are not there."""
    assert isinstance(error, HTTPException)
    shown = request.url.path if len(request.url.path) <= 200 else request.url.path[:200] + "..."
    code, message = {
        404: ("not_found", f"There is no {shown}; /docs lists the routes."),
        405: ("method_not_allowed", f"{request.method[:20]} is not allowed on {shown}."),
    }.get(error.status_code, ("http_error", str(error.detail)))
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()
