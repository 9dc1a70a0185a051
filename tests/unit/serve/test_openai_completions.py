"""/v1/completions through OpenAI's own client, in strict mode, over an engine whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from max.serve.echo_engine import EchoEngine
from max.serve.text_side import TextSide

pytestmark = pytest.mark.anyio


@pytest.fixture
def loose(openai: AsyncOpenAI) -> AsyncOpenAI:
    """The client without strict mode, whose schema of streamed completions lacks the null finish_reason of the API."""
    openai._strict_response_validation = False
    return openai


MODEL = "org/echo"


def ids_of(text: TextSide, prompt: str) -> list[int]:
    return text.tokenizer.encode(prompt, add_special_tokens=True)


async def test_text_and_tokens_are_the_same_prompt(openai: AsyncOpenAI, text: TextSide) -> None:
    prompt = "a robot of the sea"
    ids = ids_of(text, prompt)
    of_text = await openai.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=5)
    of_ids = await openai.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=5)
    assert of_text.choices[0].text == of_ids.choices[0].text == text.tokenizer.decode(ids[:5])
    assert of_text.choices[0].finish_reason == "length"
    assert of_text.usage is not None and of_text.usage.prompt_tokens == len(ids)


async def test_sixteen_tokens_unless_told_otherwise(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model=MODEL, prompt="a robot", temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_with_several_answers_each(loose: AsyncOpenAI, text: TextSide, stream: bool) -> None:
    prompts = ["a robot", "the sea", "a whale of a time"]
    options: Any = {"model": MODEL, "prompt": prompts, "n": 2, "max_tokens": 4, "temperature": 1, "seed": 0}
    if stream:
        texts = [""] * 6
        async for chunk in await loose.completions.create(**options, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        answer = await loose.completions.create(**options)
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(len(ids_of(text, prompt)) for prompt in prompts)
        assert answer.usage.completion_tokens == 24
        texts = [choice.text for choice in answer.choices]
    expected = []
    for prompt in prompts:
        ids = ids_of(text, prompt)
        for seed in (0, 1):
            expected.append(text.tokenizer.decode([ids[(place + seed) % len(ids)] for place in range(4)]))
    assert texts == expected


async def test_batches_of_token_ids(openai: AsyncOpenAI, text: TextSide) -> None:
    answer = await openai.completions.create(model=MODEL, prompt=[[300, 301], [400]], temperature=0, max_tokens=2)
    assert [choice.text for choice in answer.choices] == [
        text.tokenizer.decode([300, 301]),
        text.tokenizer.decode([400, 400]),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_before_the_answer(loose: AsyncOpenAI, text: TextSide, stream: bool) -> None:
    options: Any = {"model": MODEL, "prompt": "  a robot ", "echo": True, "temperature": 0, "max_tokens": 3}
    if stream:
        shown = ""
        async for chunk in await loose.completions.create(**options, stream=True):
            shown += chunk.choices[0].text
    else:
        shown = (await loose.completions.create(**options)).choices[0].text
    assert shown == "  a robot " + text.tokenizer.decode(ids_of(text, "  a robot ")[:3])


async def test_echo_alone(openai: AsyncOpenAI, text: TextSide, engine: EchoEngine) -> None:
    answer = await openai.completions.create(model=MODEL, prompt=[[300, 301]], echo=True, max_tokens=0)
    assert answer.choices[0].text == text.tokenizer.decode([300, 301], skip_special_tokens=False)
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    assert not engine.aborted


async def test_log_probabilities_with_offsets_into_the_text(openai: AsyncOpenAI, text: TextSide) -> None:
    prompt = "a naïve robot 🤖"
    options: Any = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 12}
    choice = (await openai.completions.create(**options, logprobs=2)).choices[0]
    assert choice.logprobs is not None
    logprobs = choice.logprobs
    assert logprobs.tokens and logprobs.text_offset and logprobs.top_logprobs and logprobs.token_logprobs
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.token_logprobs) == 12
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice.text[offset:].startswith(token)
    none = (await openai.completions.create(**options, logprobs=0)).choices[0].logprobs
    assert none is not None and none.top_logprobs is None and none.tokens == logprobs.tokens


async def test_characters_are_never_split_in_a_stream(loose: AsyncOpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": "🤖 naïve ☃ 日本", "temperature": 0, "max_tokens": 40}
    whole = (await loose.completions.create(**options)).choices[0].text
    pieces = [chunk.choices[0].text async for chunk in await loose.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole and "🤖" in whole
    assert not [piece for piece in pieces[:-1] if "�" in piece]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [8192]}, "prompt"),
        ({"prompt": [2**40]}, "prompt[0]"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": [[8191], [9000]], "echo": True}, "prompt"),
        ({"prompt": ["a"] * 200, "n": 100}, "n"),
        ({"prompt": list(range(1024))}, "prompt"),
        ({"messages": []}, "messages"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    client: httpx2.AsyncClient, engine: EchoEngine, fields: dict[str, object], param: str
) -> None:
    answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "a"} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert not engine.aborted


async def test_logprobs_with_echo_where_the_operator_allows_to_leave_them_out(
    serving: Callable[..., httpx2.AsyncClient], engine: EchoEngine, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"model": MODEL, "prompt": "a", "logprobs": 1, "echo": True, "max_tokens": 1}
    async with serving(engine, allow_unsupported_logprobs=True, enable_variable_logits=False) as client:
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200 and answer.json()["choices"][0]["logprobs"] is None
    assert "without logprobs" in caplog.text


async def test_unknown_fields_where_the_operator_allows_them(
    serving: Callable[..., httpx2.AsyncClient], engine: EchoEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(engine, allow_extra_request_fields=True) as client:
        body = {"model": MODEL, "prompt": "a", "vendor": 1, "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert "vendor" in caplog.text
        nested = {"model": MODEL, "messages": [{"role": "user", "content": "a", "vendor": 1}]}
        answer = await client.post("/v1/chat/completions", json=nested)
        assert answer.json()["error"]["param"] == "messages[0].vendor"


async def test_tokenize_and_back(client: httpx2.AsyncClient, text: TextSide) -> None:
    prompt = "a naïve robot 🤖"
    there = (await client.post("/tokenize", json={"prompt": prompt})).json()
    assert there == {"tokens": ids_of(text, prompt), "count": len(ids_of(text, prompt)), "max_model_len": 1024}
    plain = (await client.post("/tokenize", json={"prompt": prompt, "add_special_tokens": False})).json()
    back = (await client.post("/detokenize", json={"tokens": plain["tokens"]})).json()
    assert back == {"prompt": prompt}
    answer = await client.post("/detokenize", json={"tokens": [8192]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")
    assert (await client.post("/tokenize", json={"prompt": "a", "model": "other"})).status_code == 404


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("as_text", [True, False])
async def test_an_echoed_prompt_has_logprobs_too(
    client: httpx2.AsyncClient, text: TextSide, as_text: bool, max_tokens: int
) -> None:
    """As an evaluation reads them: one of each prompt's token but the first, then those of the answer."""
    prompt = "naïve robots of the 日本 sea"
    ids = ids_of(text, prompt)
    body = {"prompt": prompt if as_text else ids, "max_tokens": max_tokens, "echo": True, "logprobs": 2}
    body |= {"temperature": 0, "ignore_eos": True}
    answer = (await client.post("/v1/completions", json=body)).json()
    (choice,) = answer["choices"]
    told = choice["logprobs"]
    assert {len(told[name]) for name in told} == {len(ids) + max_tokens}
    assert told["token_logprobs"][0] is None is told["top_logprobs"][0]
    assert told["token_logprobs"][1:] == [-0.5] * (len(ids) + max_tokens - 1)
    assert all(len(top) == 2 and max(top.values()) == -0.5 for top in told["top_logprobs"][1:])
    assert told["text_offset"] == sorted(told["text_offset"]) and choice["text"].startswith(
        prompt if as_text else text.tokenizer.decode(ids, skip_special_tokens=False)
    )
    special = {text.tokenizer.token_bytes(token).decode() for token in text.tokenizer.special_ids}
    for name, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert name.startswith("bytes:") or name in special or choice["text"][offset:].startswith(name)
    assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == max_tokens


async def test_streamed_logprobs_of_an_echoed_prompt_come_with_its_text(loose: AsyncOpenAI, text: TextSide) -> None:
    options: Any = {"model": MODEL, "prompt": ["a robot", "the sea"], "echo": True, "logprobs": 1, "max_tokens": 4}
    options |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = await loose.completions.create(**options)
    parts: list[list[Any]] = [[], []]
    async for chunk in await loose.completions.create(**options, stream=True):
        for choice in chunk.choices:
            parts[choice.index].append(choice)
    for choice in whole.choices:
        told = choice.logprobs
        mine = [part.logprobs for part in parts[choice.index] if part.logprobs]
        assert told is not None and "".join(part.text for part in parts[choice.index]) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [one for each in mine for one in getattr(each, name)] == getattr(told, name)
