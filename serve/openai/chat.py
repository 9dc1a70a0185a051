"""POST /v1/chat/completions: a conversation in, the model's next message out, whole or as it comes."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from ... import __version__
from ..answer import Answer, Delta, collected, merged
from ..api_error import ApiError
from ..body import read_body
from ..event_stream import DONE, event, open_stream, unless_gone
from ..openapi import describes
from ..request_log import note
from ..service import Service, service_of
from .admission import admitted
from .chat_schema import RESERVED_VARIABLES, ChatCompletion, ChatCompletionChunk, ChatMessage, ChatRequest
from .logprobs import chat_logprobs
from .parameters import make_answers
from .usage import usage_of

router = APIRouter()
FINGERPRINT = f"max-{__version__}"


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    **describes(ChatRequest, ChatCompletion, chunk=ChatCompletionChunk),
)
async def chat_completions(request: Request) -> Response:
    service, arrived = service_of(request), perf_counter()
    body = await read_body(request, ChatRequest, service.config)
    _check(body)
    service.check_model(body.model)
    note(request, user=body.user, safety_identifier=body.safety_identifier, metadata=body.metadata)
    note(request, prompt_cache_key=body.prompt_cache_key)
    async with admitted(service):
        answers = await _answers(service, body, arrived)
    reply = _Reply(service, body, answers)
    if body.stream:
        return await open_stream(request.receive, reply.events(request))
    return await unless_gone(request.receive, reply.whole(request))


def _check(body: ChatRequest) -> None:
    """What no single field shows. Raises ApiError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", code="invalid_value", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "'stream_options' needs 'stream' to be true.", code="invalid_value", param="stream_options")
    if reserved := (body.chat_template_kwargs or {}).keys() & RESERVED_VARIABLES:
        raise ApiError(
            400,
            f"'chat_template_kwargs' may not set {min(reserved)}.",
            code="invalid_value",
            param="chat_template_kwargs",
        )


async def _answers(service: Service, body: ChatRequest, arrived: float) -> list[Answer]:
    service.ready()
    prompt = await chat_prompt(service, body.messages, body.chat_template_kwargs or {}, "messages")
    given = body.max_completion_tokens
    return make_answers(
        service,
        body,
        [prompt],
        max_tokens=body.max_tokens if given is None else given,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        arrived=arrived,
        prompt_param="messages",
    )


async def chat_prompt(
    service: Service, messages: Sequence[ChatMessage], variables: dict[str, Any], param: str
) -> list[int]:
    """The tokens of a conversation, the assistant's turn opened. Raises ApiError naming `param`."""
    text = service.text()
    template = text.template
    if template is None:
        raise ApiError(
            400, "The model has no chat template; use /v1/completions.", code="no_chat_template", param=param
        )
    plain = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        | ({"name": message.name} if message.name is not None else {})
        for message in messages
    ]

    def work() -> list[int]:
        # The template writes the special tokens itself.
        return service.tokens_of(template.render(plain, **variables), param, add_special_tokens=False)

    return await service.in_thread(work, sum(len(message["content"]) for message in plain), param)


class _Reply:
    """The answer in its two forms."""

    def __init__(self, service: Service, body: ChatRequest, answers: list[Answer]) -> None:
        self.service, self.body, self.answers = service, body, answers
        self.tokenizer = service.text().tokenizer
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": FINGERPRINT,
        }
        if body.service_tier is not None:
            self.head["service_tier"] = "default"

    async def whole(self, request: Request) -> Response:
        """All choices in one JSON object."""
        choices = []
        for index, answer in enumerate(await collected(self.answers, self.service.port)):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            logprobs = chat_logprobs(answer.tokens, self.tokenizer) if self.body.logprobs else None
            choices.append(
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}
            )
        usage = self._usage(request)
        return Response(
            msgspec.json.encode({**self.head, "choices": choices, "usage": usage}), media_type="application/json"
        )

    async def events(self, request: Request) -> AsyncGenerator[bytes]:
        """The chunks: the role of each choice before its text, usage where it was asked for, and [DONE]."""
        wants_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        # Everything around the text of a chunk is the same from chunk to chunk; this path runs for every token.
        before = b"data: " + msgspec.json.encode(self.head)[:-1] + b',"choices":[{"index":'
        tail = b'],"usage":null}\n\n' if wants_usage else b"]}\n\n"
        opened: set[int] = set()
        async with aclosing(merged(self.answers, self.service.port)) as deltas:
            async for delta in deltas:
                start, content = before + str(delta.index).encode(), b""
                if delta.index not in opened:
                    opened.add(delta.index)
                    content = start + b',"delta":{"role":"assistant","content":""},"finish_reason":null}' + tail
                yield content + self._chunk(start, delta, tail)
        usage = self._usage(request)
        if wants_usage:
            yield event({**self.head, "choices": [], "usage": usage})
        yield DONE

    def _chunk(self, start: bytes, delta: Delta, tail: bytes) -> bytes:
        logprobs = b""
        if delta.tokens:
            logprobs = b',"logprobs":' + msgspec.json.encode(chat_logprobs(delta.tokens, self.tokenizer))
        text = b'{"content":' + msgspec.json.encode(delta.text) + b"}" if delta.text or delta.tokens else b"{}"
        reason = b'"' + delta.finish_reason.encode() + b'"' if delta.finish_reason else b"null"
        return start + b',"delta":' + text + logprobs + b',"finish_reason":' + reason + b"}" + tail

    def _usage(self, request: Request) -> dict[str, Any]:
        usage = usage_of(self.answers, self.body.n or 1)
        note(request, **{name: usage[name] for name in ("prompt_tokens", "completion_tokens")})
        return usage
