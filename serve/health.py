"""Probes: whether the process lives, has started, and takes requests; and the version."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from .. import __version__
from .openapi import describes
from .service import Service, service_of

router = APIRouter()


@router.get("/livez", summary="200 while the process lives", **describes())
@router.get("/health", summary="200 unless the engine cannot be started", **describes())
@router.get("/v1/health", summary="200 unless the engine cannot be started", **describes())
async def health(request: Request) -> Response:
    service = service_of(request)
    is_broken = service.port.state == "failed" and not request.url.path.endswith("livez")
    return _state(service, 503 if is_broken else 200)


@router.get("/readyz", summary="200 while requests are answered", **describes())
@router.get("/ping", summary="200 while requests are answered", **describes())
async def ready(request: Request) -> Response:
    service = service_of(request)
    return _state(service, 200 if service.is_ready() else 503)


@router.get("/startupz", summary="200 once the engine has been ready", **describes())
async def started(request: Request) -> Response:
    service = service_of(request)
    return _state(service, 503 if service.port.ready is None else 200)


@router.get("/version", summary="The version of this server", **describes())
async def version() -> Response:
    return JSONResponse({"version": __version__})


def _state(service: Service, status: int) -> Response:
    content: dict[str, str] = {"status": service.port.state}
    if progress := service.progress():
        content["progress"] = progress
    return JSONResponse(content, status, {"Cache-Control": "no-store"})
