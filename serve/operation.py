"""Routes for those who run the server: metrics, the prefix cache, and the state that the page at / shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from .. import MaxError, __version__
from .api_error import from_max_error
from .engine_port import EnginePort
from .messages import Ready, StepStats
from .openapi import describes
from .service import service_of

router = APIRouter()


@router.get("/metrics", summary="Counts and times in the Prometheus text format", **describes(media_type="text/plain"))
async def metrics(request: Request) -> Response:
    return service_of(request).metrics.response()


@router.post("/reset_prefix_cache", summary="Forget the pages that no request uses", **describes())
async def reset_prefix_cache(request: Request) -> Response:
    service = service_of(request)
    service.ready()
    try:
        pages = await service.port.reset_prefix_cache()
    except MaxError as error:
        raise from_max_error(error) from error
    return JSONResponse({"pages": pages})


@dataclass
class Latest:
    """The engine's last step, and totals since the start, from which a reader takes rates."""

    step: StepStats | None = None
    output_tokens: int = 0
    input_tokens: int = 0

    def watch(self, port: EnginePort) -> None:
        """Follows the steps of `port`."""
        port.on_step(self._stepped)

    def _stepped(self, step: StepStats) -> None:
        self.step = step
        self.output_tokens += step.new_tokens
        if step.batch_type == "CE":
            self.input_tokens += step.input_tokens

    def shown(self) -> dict[str, Any]:
        step = self.step
        totals = {"output_tokens": self.output_tokens, "input_tokens": self.input_tokens}
        if step is None:
            return totals
        return totals | {
            "queued": step.queued,
            "running": step.running,
            "used_pages": step.used_pages,
            "num_pages": step.num_pages,
            "cache_hit_tokens": step.total_cache_hit_tokens,
            "cache_miss_tokens": step.total_cache_miss_tokens,
        }


@router.get("/status", summary="What the page at / shows", **describes())
async def status(request: Request) -> Response:
    service = service_of(request)
    ready = service.port.ready
    content = {
        "version": __version__,
        "model": service.model_name,
        "state": service.port.state,
        "progress": service.progress(),
        "has_chat": service.has_chat(),
        "engine": None if ready is None else _engine(ready),
        "load": request.app.state.latest.shown(),
    }
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


def _engine(ready: Ready) -> dict[str, Any]:
    names = (
        "max_length vocab_size max_batch_size page_tokens num_pages encoding device artifact artifact_source"
        " seconds cache"
    )
    return {name: getattr(ready, name) for name in names.split()}
