"""What a server can be told not to take: refused by the field's name, and the rest answered as ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from max.serve.echo_engine import EchoEngine
from max.serve.text_side import TextSide

pytestmark = pytest.mark.anyio
ASKED = {
    "enable_penalties": [{"frequency_penalty": 0.5}, {"presence_penalty": -1}, {"repetition_penalty": 1.1}],
    "enable_min_tokens": [{"min_tokens": 2}],
    "enable_echo": [{"echo": True}],
    "enable_variable_logits": [{"echo": True, "logprobs": 1}],
}
NEUTRAL: list[dict[str, Any]] = [
    {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1, "min_tokens": 0, "echo": False},
    {"frequency_penalty": None, "repetition_penalty": None, "min_tokens": None, "echo": None},
    {"logprobs": 1},
]


@pytest.fixture(scope="session")
def text(text: TextSide) -> TextSide:
    """Of a checkpoint that asks for a penalty."""
    return replace(text, defaults=replace(text.defaults, repetition_penalty=1.3))


async def ask(client: httpx2.AsyncClient, fields: dict[str, Any]) -> httpx2.Response:
    return await client.post("/v1/completions", json={"prompt": "a robot", "max_tokens": 4, **fields})


@pytest.mark.parametrize("feature", ASKED)
async def test_what_is_switched_off_is_refused(
    serving: Callable[..., httpx2.AsyncClient], engine: EchoEngine, feature: str
) -> None:
    async with serving(engine) as client:
        for fields in ASKED[feature]:
            assert (await ask(client, fields)).status_code == 200
    async with serving(engine, **{feature: False}) as client:
        for fields in ASKED[feature]:
            answer = await ask(client, fields)
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] in fields
            assert f"--no-{feature.replace('_', '-')}" in error["message"]
        for fields in NEUTRAL:
            assert (await ask(client, fields)).status_code == 200, fields


async def test_penalties_of_the_checkpoint_are_left_out_with_those_of_requests(
    serving: Callable[..., httpx2.AsyncClient], engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    generate = engine.generate

    def watched(request: Any) -> Any:
        seen.append(request.sampling.repetition_penalty)
        return generate(request)

    monkeypatch.setattr(engine, "generate", watched)
    for enabled in (True, False):
        async with serving(engine, enable_penalties=enabled) as client:
            assert (await ask(client, {})).status_code == 200
    assert seen == [1.3, 1.0]
