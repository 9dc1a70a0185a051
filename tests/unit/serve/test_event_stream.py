"""A client that goes ends the work behind its request at once, streaming or not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from max.serve.app import create_app
from max.serve.config import ServerConfig
from max.serve.echo_engine import EchoEngine
from max.serve.event_stream import ClientGone, EventStream, event, open_stream, unless_gone
from max.serve.metrics import Metrics
from max.serve.service import Service
from max.serve.text_side import TextSide

pytestmark = pytest.mark.anyio


class Client:
    """A client at the ASGI interface, which sends a body and goes when it is told to."""

    def __init__(self, body: bytes) -> None:
        self._messages = [{"type": "http.request", "body": body, "more_body": False}]
        self._gone = asyncio.Event()
        self.sent: list[dict[str, object]] = []

    async def receive(self) -> dict[str, object]:
        if self._messages:
            return self._messages.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: object) -> None:
        assert isinstance(message, dict)
        self.sent.append(message)

    def go(self) -> None:
        self._gone.set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_requests_of_a_client_that_goes_are_aborted(text: TextSide, stream: bool, n: int) -> None:
    engine = EchoEngine(token_s=0.005)
    metrics = Metrics("echo")
    app = create_app(Service(engine, text, ServerConfig(), "echo", metrics))
    body = {"model": "echo", "prompt": "a robot", "max_tokens": 900, "ignore_eos": True, "stream": stream, "n": n}
    client = Client(json.dumps(body).encode())
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
    }
    task = asyncio.create_task(app(scope, client.receive, client.send))  # pyright: ignore[reportArgumentType]
    while len(engine.running) < n:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    client.go()
    await task
    assert not engine.running and len(engine.aborted) == n
    assert bool(client.sent) == stream
    assert b'code="499",path="/v1/completions"} 1.0' in metrics.exposition()


async def test_a_client_that_reads_slowly_holds_back_its_own_stream() -> None:
    taken = 0

    async def events() -> AsyncGenerator[bytes]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield b"event"

    blocked = asyncio.Event()

    async def send(message: object) -> None:
        await blocked.wait()

    client = Client(b"")
    client._messages.clear()
    task = asyncio.create_task(EventStream(events(), b"first")({}, client.receive, send))
    await asyncio.sleep(0.02)
    assert taken == 0
    client.go()
    with pytest.raises(ClientGone):
        await task


async def test_events_are_closed_when_the_client_goes_before_the_first() -> None:
    closed = False

    async def events() -> AsyncGenerator[bytes]:
        nonlocal closed
        try:
            await asyncio.sleep(60)
            yield b""
        finally:
            closed = True

    client = Client(b"")
    client._messages.clear()
    client.go()
    with pytest.raises(ClientGone):
        await open_stream(client.receive, events())
    assert closed


async def test_the_result_and_the_error_of_work_come_through() -> None:
    client = Client(b"")
    client._messages.clear()

    async def work(fails: bool) -> int:
        if fails:
            raise KeyError("x")
        return 7

    assert await unless_gone(client.receive, work(False)) == 7
    with pytest.raises(KeyError):
        await unless_gone(client.receive, work(True))


def test_an_event_is_one_line_of_data() -> None:
    assert event({"a": "x\ny"}, "done") == b'event: done\ndata: {"a":"x\\ny"}\n\n'
