"""/v1/responses through OpenAI's own client, in strict mode, over an engine whose answers are known."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

pytestmark = pytest.mark.anyio

MODEL = "org/echo"


async def test_a_response_and_its_counts(openai: AsyncOpenAI) -> None:
    response = await openai.responses.create(model=MODEL, input="a robot of the sea", temperature=0)
    chat = await openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a robot of the sea"}], temperature=0
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "completed" and response.incomplete_details is None
    assert response.usage is not None and chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens


async def test_a_response_that_is_cut(openai: AsyncOpenAI) -> None:
    response = await openai.responses.create(
        model=MODEL,
        input="a robot of the sea",
        max_output_tokens=3,
        temperature=0,
        metadata={"k": "v"},
        instructions="define",
    )
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.metadata == {"k": "v"} and response.instructions == "define"


async def test_the_events_build_the_response(openai: AsyncOpenAI) -> None:
    options: Any = {"model": MODEL, "input": "a robot of the sea", "temperature": 0}
    options["include"] = ["message.output_text.logprobs"]
    whole = await openai.responses.create(**options)
    events = [event async for event in await openai.responses.create(**options, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) == len(events) - 8
    assert "".join(event.delta for event in deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == whole.output_text
    assert last.response.output[0].type == "message" and whole.output[0].type == "message"
    assert last.response.output[0].content == whole.output[0].content


async def test_the_clients_own_reading_of_a_stream(openai: AsyncOpenAI) -> None:
    async with openai.responses.stream(model=MODEL, input="a robot of the sea", temperature=0) as stream:
        async for _ in stream:
            pass
        assert (await stream.get_final_response()).status == "completed"


async def test_earlier_output_can_be_sent_back(openai: AsyncOpenAI) -> None:
    first = await openai.responses.create(model=MODEL, input="a robot", temperature=0)
    conversation: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "a robot"}]},
        *(item.model_dump() for item in first.output),
        {"role": "developer", "content": "define"},
        {"role": "user", "content": "more"},
    ]
    second = await openai.responses.create(model=MODEL, input=conversation, temperature=0)
    assert second.usage is not None and first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": ""}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": ""}]}, "input[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"stream_options": {}}, "stream_options"),
    ],
)  # fmt: skip
async def test_what_cannot_be_done_is_refused_by_name(
    client: httpx2.AsyncClient, fields: dict[str, object], param: str
) -> None:
    answer = await client.post("/v1/responses", json={"model": MODEL, "input": "a"} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_nothing_is_kept(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/responses/resp_1")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
