"""GET /v1/models: the one model that is served."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from ..openapi import describes
from ..service import Service, service_of

router = APIRouter()


class ModelObject(BaseModel):
    """A model. max_model_len: tokens of prompt and answer together, null until the engine is ready"""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "max"
    max_model_len: int | None


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("/v1/models", summary="List the models", **describes(None, ModelList))
async def list_models(request: Request) -> ModelList:
    return ModelList(data=[_served(service_of(request))])


@router.get(
    "/v1/models/{model:path}", summary="Describe a model; its id may hold slashes", **describes(None, ModelObject)
)
async def get_model(request: Request, model: str) -> ModelObject:
    service = service_of(request)
    service.check_model(model)
    return _served(service)


def _served(service: Service) -> ModelObject:
    ready = service.port.ready
    return ModelObject(
        id=service.model_name, created=service.created, max_model_len=None if ready is None else ready.max_length
    )
