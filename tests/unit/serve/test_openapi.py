"""What /openapi.json says of requests and streams is what the routes take and send."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from max.serve.echo_engine import MAX_LENGTH, VOCAB_SIZE, EchoEngine
from max.serve.openai.chat_schema import ChatCompletionChunk
from max.serve.openai.completions_schema import CompletionChunk
from max.serve.openai.responses_schema import ResponseEvent
from max.serve.openapi_bounds import OF_MODEL, bounded, decimals_up_to

pytestmark = pytest.mark.anyio

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a robot"}]},
    "/v1/completions": {"prompt": "a robot"},
    "/v1/responses": {"input": "a robot"},
}
REQUESTS = {
    "/v1/chat/completions": "ChatRequest",
    "/v1/completions": "CompletionRequest",
    "/v1/responses": "ResponseRequest",
}


async def schemas(client: httpx2.AsyncClient) -> dict[str, Any]:
    return (await client.get("/openapi.json")).json()["components"]["schemas"]


@given(st.integers(0, 10**6), st.integers(0, 2 * 10**6), st.integers(0, 3))
def test_decimals_up_to_a_number(largest: int, number: int, zeros: int) -> None:
    pattern = f"0*({decimals_up_to(largest)})"
    for each in (number, largest, largest + 1, 10 * largest + 9):
        assert bool(re.fullmatch(pattern, "0" * zeros + str(each))) == (each <= largest)


async def test_bounds_are_those_of_the_model(client: httpx2.AsyncClient, engine: EchoEngine) -> None:
    found = await schemas(client)
    assert OF_MODEL not in json.dumps(found)
    completion = found["CompletionRequest"]["properties"]
    assert completion["stop_token_ids"]["anyOf"][0]["items"]["maximum"] == VOCAB_SIZE - 1
    assert completion["min_tokens"]["anyOf"][0]["maximum"] == MAX_LENGTH - 1
    tokens = next(form for form in completion["prompt"]["oneOf"] if form.get("items", {}).get("type") == "integer")
    assert (tokens["items"]["maximum"], tokens["maxItems"], tokens["minItems"]) == (VOCAB_SIZE - 1, MAX_LENGTH - 1, 1)
    keys = completion["logit_bias"]["anyOf"][0]["propertyNames"]["pattern"]
    assert re.search(keys, "8191") and re.search(keys, "007") and not re.search(keys, "8192")
    assert completion["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 128}


async def test_bounds_come_with_the_engine(serving: Callable[..., httpx2.AsyncClient], engine: EchoEngine) -> None:
    ready, engine.ready = engine.ready, None
    async with serving(engine) as client:
        before = (await schemas(client))["CompletionRequest"]["properties"]["min_tokens"]["anyOf"][0]
        engine.ready = ready
        after = (await schemas(client))["CompletionRequest"]["properties"]["min_tokens"]["anyOf"][0]
    assert (before["maximum"], after["maximum"]) == (2**31 - 1, MAX_LENGTH - 1)
    with pytest.raises(AssertionError, match="unknown mark"):
        bounded({OF_MODEL: "else"}, ready)


def fits(value: dict[str, Any], rule: dict[str, Any]) -> bool:
    """Whether a body keeps a rule, of the words that the rules are made of."""

    def matches(field: Any, schema: dict[str, Any]) -> bool:
        for word, argument in schema.items():
            match word:
                case "type":
                    kept = field is None
                    assert argument == "null"
                case "const":
                    kept = field is argument or (field == argument and type(field) is type(argument))
                case "enum":
                    kept = any(field is each or (field == each and type(field) is type(each)) for each in argument)
                case "minimum":
                    kept = not isinstance(field, int) or field >= argument
                case "anyOf":
                    kept = any(matches(field, each) for each in argument)
                case _:
                    raise AssertionError(word)
            if not kept:
                return False
        return True

    return any(
        all(matches(value[name], schema) for name, schema in form["properties"].items() if name in value)
        and all(name in value for name in form.get("required", []))
        for form in rule["anyOf"]
    )


RULED: dict[str, dict[str, list[Any]]] = {
    "/v1/chat/completions": {
        "logprobs": [None, False, True],
        "top_logprobs": [None, 0, 2],
        "stream": [None, False, True],
        "stream_options": [None, {"include_usage": True}],
    },
    "/v1/completions": {
        "max_tokens": [None, 0, 1],
        "echo": [None, False, True],
        "stream": [None, False, True],
        "stream_options": [None, {}],
        "best_of": [None, 1, 2],
        "n": [None, 1],
    },
    "/v1/responses": {"stream": [None, False, True], "stream_options": [None, {}]},
}


@pytest.mark.quick(leaves_out=[True])
@pytest.mark.parametrize("path", RULED)
@pytest.mark.parametrize("leaves_out", [False, True], ids=["null", "absent"])
async def test_rules_between_fields_are_told_as_they_are_checked(
    client: httpx2.AsyncClient, path: str, leaves_out: bool
) -> None:
    rules = (await schemas(client))[REQUESTS[path]]["allOf"]
    kept = 0
    for values in itertools.product(*RULED[path].values()):
        fields = dict(zip(RULED[path], values, strict=True))
        if leaves_out:
            fields = {name: value for name, value in fields.items() if value is not None}
        answer = await client.post(path, json=BODIES[path] | fields)
        told = all(fits(fields, rule) for rule in rules)
        assert (answer.status_code == 200) == told, (fields, answer.text)
        kept += told
    assert 0 < kept < len(list(itertools.product(*RULED[path].values())))


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"max_tokens": 2.0, "n": 1.0, "seed": -3.0, "top_k": 4.0, "logprobs": 1.0, "best_of": 1.0}, 200),
        ({"prompt": [300.0, 301, 302.0], "stop_token_ids": [5.0], "max_tokens": 2}, 200),
        ({"prompt": [[300, 301.0], [302.0]], "max_tokens": 2}, 200),
        ({"max_tokens": 2.5}, 400),
        ({"max_tokens": True}, 400),
        ({"max_tokens": "2"}, 400),
        ({"max_tokens": 1e300}, 400),
        ({"prompt": [300.5]}, 400),
        ({"prompt": [300, True]}, 400),
        ({"prompt": [8192.0]}, 400),
    ],
)
async def test_a_whole_number_may_have_a_point(client: httpx2.AsyncClient, fields: dict[str, Any], status: int) -> None:
    """As JSON Schema counts 1.0 among the integers; so a client in another language may write it."""
    answer = await client.post("/v1/completions", json={"prompt": "a"} | fields)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    ("path", "fields", "chunk"),
    [
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 4}, ChatCompletionChunk),
        ("/v1/chat/completions", {"service_tier": "auto", "max_tokens": 2}, ChatCompletionChunk),
        ("/v1/completions", {"logprobs": 2, "echo": True, "max_tokens": 4}, CompletionChunk),
        ("/v1/completions", {"max_tokens": 2}, CompletionChunk),
        ("/v1/responses", {"include": ["message.output_text.logprobs"], "max_output_tokens": 4}, ResponseEvent),
    ],
)
async def test_events_are_as_described(
    client: httpx2.AsyncClient, path: str, fields: dict[str, Any], chunk: type[BaseModel]
) -> None:
    usage = {} if "responses" in path else {"stream_options": {"include_usage": True}}
    answer = await client.post(path, json=BODIES[path] | fields | usage | {"stream": True})
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    told = [event for event in events if event != "[DONE]"]
    for event in told:
        chunk.model_validate_json(event, strict=True, extra="forbid")
    assert len(told) >= 2
    document = (await client.get("/openapi.json")).json()
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    forms = content["properties"]["data"]["anyOf"]
    assert forms[0] == {"const": "[DONE]"}
    assert forms[1]["contentSchema"]["anyOf"][0] == {"$ref": f"#/components/schemas/{chunk.__name__}"}
