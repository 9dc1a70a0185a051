"""Every route answers in its shape, errors included, whatever state the engine is in."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable

import httpx2
import pytest

from max import MaxError, __version__
from max.serve.echo_engine import EchoEngine
from max.serve.engine_port import State
from max.serve.messages import Loading, StartFailed, Submit, Tokens

pytestmark = pytest.mark.anyio

MODEL = "org/echo"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a robot of the sea"}], "max_tokens": 9}
Serving = Callable[..., httpx2.AsyncClient]


def assert_error(answer: httpx2.Response, status: int, code: str) -> None:
    """Checks status and shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["code"] == code


async def test_models(client: httpx2.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == [MODEL]
    one = await client.get(f"/v1/models/{MODEL}")
    assert one.json() == listed["data"][0] and one.json()["max_model_len"] == 1024
    assert_error(await client.get("/v1/models/org/other"), 404, "model_not_found")


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/v1/files", "/v1/chat/completions/", "/static/../app.py"])
async def test_routes_that_are_not_there(client: httpx2.AsyncClient, path: str) -> None:
    assert_error(await client.get(path), 404, "not_found")


async def test_methods_that_are_not_there(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/chat/completions")
    assert_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert_error(await client.delete(f"/v1/models/{MODEL}"), 405, "method_not_allowed")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"model": ' + b"9" * 5000 + b"}",
        b'{"temperature": 1e999, "model": "m", "messages": []}',
        b"\x00\x01",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
async def test_bodies_that_are_no_request(client: httpx2.AsyncClient, path: str, content: bytes) -> None:
    answer = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


async def test_bodies_of_other_types(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert_error(answer, 415, "invalid_content_type")


async def test_bodies_that_are_too_large(serving: Serving, engine: EchoEngine) -> None:
    async def unannounced() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    async with serving(engine, max_request_size=1000) as client:
        assert_error(await client.post("/v1/completions", content=b" " * 1001), 413, "request_too_large")
        assert_error(await client.post("/v1/completions", content=unannounced()), 413, "request_too_large")


STATES: list[tuple[State, dict[str, int]]] = [
    ("starting", {"/health": 200, "/livez": 200, "/readyz": 503, "/startupz": 503}),
    ("ready", {"/health": 200, "/livez": 200, "/readyz": 200, "/startupz": 200}),
    ("restarting", {"/health": 200, "/livez": 200, "/readyz": 503, "/startupz": 200}),
    ("draining", {"/health": 200, "/livez": 200, "/readyz": 503, "/startupz": 200}),
    ("failed", {"/health": 503, "/livez": 200, "/readyz": 503, "/startupz": 200}),
]


@pytest.mark.parametrize(("state", "probes"), STATES, ids=[state for state, _ in STATES])
async def test_probes_and_answers_in_every_state(
    client: httpx2.AsyncClient, engine: EchoEngine, state: State, probes: dict[str, int]
) -> None:
    engine.state = state
    if state == "starting":
        engine.ready, engine.progress = None, Loading("compiling", 0.25)
    for path, status in probes.items():
        answer = await client.get(path)
        assert (path, answer.status_code) == (path, status)
        assert answer.json()["status"] == state
    assert (await client.get("/v1/models")).status_code == 200
    answer = await client.post("/v1/chat/completions", json=CHAT)
    if state == "ready":
        assert answer.status_code == 200
    else:
        assert_error(answer, 503, state)
        assert int(answer.headers["retry-after"]) > 0
    if state == "starting":
        assert "compiling, 25%" in answer.json()["error"]["message"]


async def test_why_the_engine_cannot_start_is_told(client: httpx2.AsyncClient, engine: EchoEngine) -> None:
    engine.state, engine.progress = "failed", StartFailed("user", "no such folder", "Name another.")
    assert "no such folder" in (await client.get("/health")).text


async def test_a_full_engine_is_a_429_with_a_time(serving: Serving) -> None:
    async with serving(EchoEngine(max_running=0)) as client:
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert_error(answer, 429, "no_capacity")
            assert answer.json()["error"]["type"] == "rate_limit_error" and int(answer.headers["retry-after"]) > 0


class BreakingEngine(EchoEngine):
    """Fails behind so many tokens."""

    def __init__(self, tokens: int, error: Exception) -> None:
        super().__init__()
        self._left, self._error = tokens, error

    async def generate(self, request: Submit) -> AsyncIterator[list[Tokens]]:
        async for batch in super().generate(request):
            if self._left == 0:
                raise self._error
            self._left -= 1
            yield batch


async def test_an_engine_that_fails_is_a_500(serving: Serving) -> None:
    for stream in (False, True):
        engine = BreakingEngine(0, MaxError("the engine worker has ended", "Send it again."))
        async with serving(engine) as client:
            assert_error(await client.post("/v1/chat/completions", json=CHAT | {"stream": stream}), 500, "engine_error")


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", CHAT), ("/v1/responses", {"model": MODEL, "input": "a robot of the sea"})],
)
async def test_a_stream_whose_engine_fails_ends_with_an_error(
    serving: Serving, path: str, body: dict[str, object]
) -> None:
    async with serving(BreakingEngine(4, MaxError("the engine worker has ended", "Send it again."))) as client:
        answer = await client.post(path, json=body | {"stream": True, "temperature": 0})
    assert answer.status_code == 200
    assert "The engine worker has ended." in answer.text.strip().splitlines()[-1]
    assert "[DONE]" not in answer.text and "completed" not in answer.text


async def test_a_fault_of_ours_is_a_500_in_shape(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(BreakingEngine(0, ValueError("a fault"))) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT)
    assert_error(answer, 500, "internal_error")
    assert "a fault" not in answer.text and "ValueError: a fault" in caplog.text
    assert answer.headers["x-request-id"] in caplog.text


async def test_version_cache_and_state(client: httpx2.AsyncClient, engine: EchoEngine) -> None:
    assert (await client.get("/version")).json() == {"version": __version__}
    usage = (await client.post("/v1/chat/completions", json=CHAT)).json()["usage"]
    assert (await client.post("/reset_prefix_cache")).json() == {"pages": 1}
    status = (await client.get("/status")).json()
    assert status["model"] == MODEL and status["state"] == "ready" and status["engine"]["max_length"] == 1024
    assert status["load"]["num_pages"] == 1024 and status["load"]["output_tokens"] == usage["completion_tokens"]
    engine.state = "restarting"
    assert (await client.post("/reset_prefix_cache")).status_code == 503


async def test_the_description_refers_to_nothing_that_is_missing(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/metrics"} <= document["paths"].keys()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', (await client.get("/openapi.json")).text))
    assert referred and referred <= document["components"]["schemas"].keys()


async def test_no_other_origin_may_ask(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/models", headers={"origin": "http://elsewhere"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_what_is_wrong_is_told_in_the_words_of_the_api(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json={**CHAT, "messages": []})
    assert answer.json()["error"]["message"] == "'messages' should have at least 1 item, not 0."
