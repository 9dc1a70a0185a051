"""/v1/chat/completions through OpenAI's own client, in strict mode, over an engine whose answers are known."""

from __future__ import annotations

from typing import Any

import httpx2
import openai as sdk
import pytest
from openai import AsyncOpenAI

from max.serve.echo_engine import EchoEngine
from max.serve.text_side import TextSide

pytestmark = pytest.mark.anyio

MODEL = "org/echo"
ROBOT: Any = [{"role": "user", "content": "a robot of the sea"}]


def prompt_of(text: TextSide, messages: Any) -> list[int]:
    assert text.template is not None
    return text.tokenizer.encode(text.template.render(messages), add_special_tokens=False)


async def test_an_answer_is_the_prompt_as_text(openai: AsyncOpenAI, text: TextSide) -> None:
    prompt = prompt_of(text, ROBOT)
    answer = await openai.chat.completions.create(
        model=MODEL, messages=ROBOT, max_completion_tokens=6, temperature=0, extra_body={"ignore_eos": True}
    )
    choice = answer.choices[0]
    assert choice.message.content == text.tokenizer.decode(prompt[:6])
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 6)
    assert answer.usage.total_tokens == len(prompt) + 6
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == MODEL


async def test_an_answer_ends_at_the_models_stop_token(openai: AsyncOpenAI, text: TextSide) -> None:
    prompt = prompt_of(text, ROBOT)
    ends = text.defaults.stop_token_ids
    first_end = next(place for place, token in enumerate(prompt) if token in ends)
    answer = await openai.chat.completions.create(model=MODEL, messages=ROBOT, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == text.tokenizer.decode(prompt[:first_end])
    assert answer.usage is not None and answer.usage.completion_tokens == first_end + 1


async def test_a_stream_holds_what_the_whole_answer_holds(openai: AsyncOpenAI) -> None:
    options: Any = {"model": MODEL, "messages": ROBOT, "max_tokens": 30, "seed": 4, "n": 3, "temperature": 1}
    whole = await openai.chat.completions.create(**options)
    texts, roles, reasons = [""] * 3, [0] * 3, [""] * 3
    async for chunk in await openai.chat.completions.create(**options, stream=True):
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert roles == [1, 1, 1]
    assert len(set(texts)) == 3, "the answers differ by their seeds"


async def test_usage_comes_last_where_it_is_asked_for(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(
        model=MODEL, messages=ROBOT, max_tokens=3, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3


async def test_cached_tokens_are_told_the_second_time(openai: AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "robot " * 40}]
    options: Any = {"model": MODEL, "messages": messages, "max_tokens": 1}
    counts = []
    for salt in ("a", "a", "b"):
        answer = await openai.chat.completions.create(**options, extra_body={"cache_salt": salt})
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        counts.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert counts[0] == 0 and counts[1] is not None and counts[1] > 0 and counts[2] == 0


async def test_log_probabilities(openai: AsyncOpenAI, text: TextSide) -> None:
    options: Any = {"model": MODEL, "messages": ROBOT, "max_tokens": 8, "temperature": 0, "logprobs": True}
    answer = await openai.chat.completions.create(**options, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    shown = [token for token in prompt_of(text, ROBOT) if token not in text.defaults.stop_token_ids][:8]
    assert [bytes(entry.bytes or []) for entry in logprobs.content] == [
        text.tokenizer.token_bytes(token) for token in shown[: len(logprobs.content)]
    ]
    assert [entry.logprob for entry in logprobs.content] == [-0.5] * len(logprobs.content)
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * len(logprobs.content)
    streamed = []
    async for chunk in await openai.chat.completions.create(**options, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            streamed += (choice.logprobs.content or []) if choice.logprobs else []
    assert streamed == logprobs.content
    alone = (await openai.chat.completions.create(**options)).choices[0].logprobs
    assert alone is not None and alone.content is not None and alone.content[0].top_logprobs == []


async def test_text_is_held_back_only_while_it_can_become_a_stop(openai: AsyncOpenAI, text: TextSide) -> None:
    options: Any = {"model": MODEL, "messages": ROBOT, "temperature": 0, "max_tokens": 12}
    full = (await openai.chat.completions.create(**options)).choices[0].message.content or ""
    stop = full[7:12]
    stopped = (await openai.chat.completions.create(**options, stop=[stop, "never"])).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (full[:7], "stop")
    streamed = ""
    async for chunk in await openai.chat.completions.create(**options, stop=stop, stream=True):
        streamed += chunk.choices[0].delta.content or ""
    assert streamed == full[:7]


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
async def test_seeds_of_every_sign(openai: AsyncOpenAI, seed: int) -> None:
    await openai.chat.completions.create(model=MODEL, messages=ROBOT, max_tokens=1, seed=seed)


OPTIONAL = ["tools", "tool_choice", "response_format", "n", "stop", "seed", "logprobs", "logit_bias", "stream", "user"]


async def test_roles_parts_and_nulls(client: httpx2.AsyncClient, text: TextSide) -> None:
    parts = [{"type": "text", "text": "a robot"}, {"type": "text", "text": "of the sea"}]
    body = {
        "model": MODEL,
        "messages": [{"role": "developer", "content": "define"}, {"role": "user", "content": parts, "name": None}],
        "temperature": 0,
        "max_tokens": 50,
        "ignore_eos": True,
        **dict.fromkeys(OPTIONAL),
    }
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    plain = [{"role": "system", "content": "define"}, {"role": "user", "content": "a robot\nof the sea"}]
    assert answer.json()["usage"]["prompt_tokens"] == len(prompt_of(text, plain))


NEEDLESS = {"tool_choice": "none", "response_format": {"type": "text"}, "store": False, "service_tier": "auto"}


async def test_values_that_ask_for_nothing_special(client: httpx2.AsyncClient) -> None:
    body = {"model": MODEL, "messages": ROBOT, "max_tokens": 1, **NEEDLESS}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and answer.json()["service_tier"] == "default"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}], "tools"),
        ("tool_choice", "auto", "tool_choice"),
        ("response_format", {"type": "json_object"}, "response_format.type"),
        ("functions", [], "functions"),
        ("audio", {"voice": "x"}, "audio"),
        ("modalities", ["audio"], "modalities[0]"),
        ("store", True, "store"),
        ("store", 0, "store"),
        ("chat_template", "{{ 7 }}", "chat_template"),
        ("prediction", {"type": "content", "content": "x"}, "prediction"),
        ("temperature", 2.5, "temperature"),
        ("temperature", "hot", "temperature"),
        ("temperature", True, "temperature"),
        ("top_p", -0.1, "top_p"),
        ("top_k", -2, "top_k"),
        ("n", 0, "n"),
        ("n", 129, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_completion_tokens", -1, "max_completion_tokens"),
        ("seed", 2**64, "seed"),
        ("stop", ["a"] * 17, "stop"),
        ("stop", "", "stop"),
        ("top_logprobs", 3, "top_logprobs"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("logit_bias", {"robot": 1}, "logit_bias"),
        ("logit_bias", {"8192": 1}, "logit_bias"),
        ("logit_bias", {"1": 101}, "logit_bias.1"),
        ("stop_token_ids", [8192], "stop_token_ids"),
        ("min_tokens", 2000, "min_tokens"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs"),
        ("messages", [], "messages"),
        ("messages", [{"role": "tool", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": None}], "messages[0].content"),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
         "messages[0].content[0].type"),
        ("messages", [{"role": "user", "content": "robot " * 2000}], "messages"),
        ("vendor", 1, "vendor"),
    ],
)  # fmt: skip
async def test_what_cannot_be_done_is_refused_by_name(
    client: httpx2.AsyncClient, engine: EchoEngine, field: str, value: object, param: str
) -> None:
    body = {"model": MODEL, "messages": ROBOT, "max_tokens": 4} | {field: value}
    answer = await client.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"] and error["code"]
    assert not engine.running and not engine.aborted


async def test_a_model_that_is_not_served(openai: AsyncOpenAI) -> None:
    with pytest.raises(sdk.NotFoundError) as raised:
        await openai.chat.completions.create(model="other", messages=ROBOT)
    assert raised.value.code == "model_not_found"


async def test_megabytes_are_refused_without_cutting_them(openai: AsyncOpenAI) -> None:
    long: Any = [{"role": "user", "content": "robot " * 300_000}]
    with pytest.raises(sdk.BadRequestError, match="at least") as raised:
        await openai.chat.completions.create(model=MODEL, messages=long)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(sdk.BadRequestError, match="at least"):
        await openai.completions.create(model=MODEL, prompt=["a", "robot " * 300_000])
    with pytest.raises(sdk.BadRequestError, match="should have at most 2097152 characters"):
        await openai.completions.create(model=MODEL, prompt="robot " * 500_000)


async def test_a_prompt_that_is_too_long_is_a_400_when_streaming_too(openai: AsyncOpenAI) -> None:
    long: Any = [{"role": "user", "content": "robot " * 3000}]
    for stream in (False, True):
        with pytest.raises(sdk.BadRequestError) as raised:
            await openai.chat.completions.create(model=MODEL, messages=long, stream=stream)
        assert raised.value.code == "context_length_exceeded"
