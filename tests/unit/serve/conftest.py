"""A server without a model: the built-in tokenizer over an engine that echoes prompts, reached without a socket."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
from openai import AsyncOpenAI

from max.serve.app import create_app
from max.serve.config import ServerConfig
from max.serve.echo_engine import EchoEngine
from max.serve.metrics import Metrics
from max.serve.service import Service
from max.serve.text_side import TextSide

MODEL = "org/echo"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def text() -> TextSide:
    """The text side of the built-in model."""
    found = importlib.util.find_spec("max.models.builtin")
    assert found is not None and found.origin is not None
    return TextSide.load(Path(found.origin).parent)


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def serving(text: TextSide) -> Callable[..., httpx2.AsyncClient]:
    """Makes a client of a server over this engine, with these settings."""

    def make(engine: EchoEngine, **settings: object) -> httpx2.AsyncClient:
        service = Service(engine, text, ServerConfig.model_validate(settings), MODEL, Metrics(MODEL))
        transport = httpx2.ASGITransport(create_app(service))
        return httpx2.AsyncClient(transport=transport, base_url="http://server")

    return make


@pytest.fixture
async def client(serving: Callable[..., httpx2.AsyncClient], engine: EchoEngine) -> AsyncIterator[httpx2.AsyncClient]:
    async with serving(engine) as made:
        yield made


@pytest.fixture
def openai(client: httpx2.AsyncClient) -> AsyncOpenAI:
    """The OpenAI client, which raises for every field that is missing or of another type."""
    return AsyncOpenAI(
        base_url="http://server/v1",
        api_key="none",
        http_client=client,
        max_retries=0,
        _strict_response_validation=True,
    )
