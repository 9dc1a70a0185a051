"""POST /v1/completions: continues texts or token ids, whole or as the answers come."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import perf_counter
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from ..answer import Answer, Delta, WholeAnswer, collected, merged
from ..api_error import ApiError
from ..body import read_body
from ..event_stream import DONE, event, open_stream, unless_gone
from ..openapi import describes
from ..request_log import note
from ..service import Service, service_of
from .admission import admitted
from .chat import FINGERPRINT
from .completions_schema import MAX_PROMPTS, Completion, CompletionChunk, CompletionRequest
from .logprobs import completion_logprobs, echoed_logprobs, joined
from .parameters import make_answers, switched_off
from .usage import usage_of

logger = logging.getLogger(__name__)
router = APIRouter()
_DEFAULT_MAX_TOKENS = 16  # as in the OpenAI API
_MAX_ANSWERS = 512


@router.post(
    "/v1/completions", summary="Continue a text", **describes(CompletionRequest, Completion, chunk=CompletionChunk)
)
async def completions(request: Request) -> Response:
    service, arrived = service_of(request), perf_counter()
    body = await read_body(request, CompletionRequest, service.config)
    service.check_model(body.model)
    logprobs = _checked_logprobs(body, service)
    note(request, user=body.user)
    async with admitted(service):
        service.ready()
        prompts, texts = await _prompts(body, service)
        max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        answers = make_answers(
            service,
            body,
            prompts,
            max_tokens=max(1, max_tokens),
            top_logprobs=logprobs,
            arrived=arrived,
            prompt_param="prompt",
            prompt_logprobs=bool(body.echo) and logprobs is not None,
        )
    reply = _Reply(service, body, answers, texts, logprobs)
    if max_tokens == 0:
        return await unless_gone(request.receive, reply.echo_alone(request))
    if body.stream:
        return await open_stream(request.receive, reply.events(request))
    return await unless_gone(request.receive, reply.whole(request))


def _checked_logprobs(body: CompletionRequest, service: Service) -> int | None:
    """The alternatives to report. Raises ApiError for combinations that cannot be answered."""
    if body.echo and not service.config.enable_echo:
        raise switched_off("echo", "enable_echo")
    prompts = len(body.prompt) if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else 1
    wrong = text = ""
    if body.best_of is not None and body.best_of != (body.n or 1):
        wrong, text = "best_of", "is supported only where it equals 'n'"
    elif body.stream_options is not None and not body.stream:
        wrong, text = "stream_options", "needs 'stream' to be true"
    elif body.max_tokens == 0 and not body.echo:
        wrong, text = "max_tokens", "is 0, which only 'echo' can answer"
    elif body.max_tokens == 0 and body.stream:
        wrong, text = "max_tokens", "is 0, which cannot be streamed"
    elif prompts * (body.n or 1) > _MAX_ANSWERS:
        wrong, text = "n", f"asks for {prompts * (body.n or 1)} answers to all prompts; {_MAX_ANSWERS} are allowed"
    if wrong:
        raise ApiError(400, f"'{wrong}' {text}.", code="invalid_value", param=wrong)
    if body.echo and body.logprobs is not None and not service.config.enable_variable_logits:
        if not service.config.allow_unsupported_logprobs:
            raise switched_off("logprobs", "enable_variable_logits")
        logger.warning("a request is answered without logprobs: --no-enable-variable-logits")
        return None
    return body.logprobs


async def _prompts(body: CompletionRequest, service: Service) -> tuple[list[list[int]], list[str]]:
    """The tokens of each prompt, and its text where that is echoed."""
    text, given = service.text(), body.prompt
    items: list[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    assert len(items) <= MAX_PROMPTS, "the schema bounds the number of prompts"

    def tokens() -> list[list[int]]:
        return [
            service.tokens_of(item, "prompt", add_special_tokens=True) if isinstance(item, str) else item
            for item in items
        ]

    def echoed() -> list[str]:
        return [
            item if isinstance(item, str) else text.tokenizer.decode(item, skip_special_tokens=False) for item in items
        ]

    size = sum(map(len, items))
    prompts = await service.in_thread(tokens, size, "prompt")
    if not body.echo:
        return prompts, [""] * len(items)
    # Ids that are too large for the tokenizer's library; the answers are refused for them as well.
    _check_ids(prompts, service)
    return prompts, await service.in_thread(echoed, size, "prompt")


def _check_ids(prompts: list[list[int]], service: Service) -> None:
    limit = service.ready().vocab_size
    for prompt in prompts:
        if wrong := next((token_id for token_id in prompt if token_id >= limit), None):
            raise ApiError(
                400,
                f"The prompt holds the token id {wrong}, and the model has no such token.",
                code="invalid_value",
                param="prompt",
            )


class _Reply:
    """The answer in its forms."""

    def __init__(
        self, service: Service, body: CompletionRequest, answers: list[Answer], texts: list[str], logprobs: int | None
    ) -> None:
        self.service, self.body, self.answers, self.logprobs = service, body, answers, logprobs
        self.choices = body.n or 1
        self.prompts = [text for text in texts for _ in range(self.choices)]
        self.echoed = list(self.prompts)  # and have not been sent yet
        self.begun: set[int] = set()
        self.tokenizer = service.text().tokenizer
        self.head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": FINGERPRINT,
        }

    async def whole(self, request: Request) -> Response:
        """All choices in one JSON object."""
        return self._response(request, await collected(self.answers, self.service.port))

    async def echo_alone(self, request: Request) -> Response:
        """The prompts and nothing else: max_tokens is 0. The engine is asked where it has to compute them."""
        if self.logprobs is not None:
            await collected(self.answers, self.service.port)
            for answer in self.answers:
                answer.new_tokens = 0  # the one that it cannot do without is not told
        return self._response(request, [WholeAnswer(finish_reason="length") for _ in self.answers])

    def _response(self, request: Request, answers: list[WholeAnswer]) -> Response:
        choices = [
            {
                "index": index,
                "text": self.echoed[index] + answer.text,
                "logprobs": self._logprobs(index, answer.tokens, is_first=True),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        content = {**self.head, "choices": choices, "usage": self._usage(request)}
        return Response(msgspec.json.encode(content), media_type="application/json")

    def _logprobs(self, index: int, tokens: Any, *, is_first: bool) -> dict[str, Any] | None:
        """Of new tokens, and before the first ones of the echoed prompt."""
        if self.logprobs is None:
            return None
        answer, text = self.answers[index], self.prompts[index]
        of_answer = completion_logprobs(tokens, self.tokenizer, self.logprobs, len(text))
        if not (is_first and self.body.echo):
            return of_answer
        told = answer.prompt_logprobs or []
        of_prompt = echoed_logprobs(answer.request.prompt_ids, told, self.tokenizer, self.logprobs, text)
        return joined(of_prompt, of_answer)

    async def events(self, request: Request) -> AsyncGenerator[bytes]:
        """The chunks, an echoed prompt before the first text of its choice; usage where asked for; [DONE]."""
        wants_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        # As in chat.py: everything around the text is the same from chunk to chunk.
        before = b"data: " + msgspec.json.encode(self.head)[:-1] + b',"choices":[{"index":'
        tail = b'}],"usage":null}\n\n' if wants_usage else b"}]}\n\n"
        async with aclosing(merged(self.answers, self.service.port)) as deltas:
            async for delta in deltas:
                yield self._chunk(before, delta, tail)
        usage = self._usage(request)
        if wants_usage:
            yield event({**self.head, "choices": [], "usage": usage})
        yield DONE

    def _chunk(self, before: bytes, delta: Delta, tail: bytes) -> bytes:
        text, self.echoed[delta.index] = self.echoed[delta.index] + delta.text, ""
        is_first = delta.index not in self.begun
        self.begun.add(delta.index)
        has_logprobs = delta.tokens or (is_first and self.body.echo)
        told = self._logprobs(delta.index, delta.tokens, is_first=is_first) if has_logprobs else None
        logprobs = b"null" if told is None else msgspec.json.encode(told)
        reason = b'"' + delta.finish_reason.encode() + b'"' if delta.finish_reason else b"null"
        index = str(delta.index).encode()
        middle = b',"text":' + msgspec.json.encode(text) + b',"logprobs":' + logprobs
        return before + index + middle + b',"finish_reason":' + reason + tail

    def _usage(self, request: Request) -> dict[str, Any]:
        usage = usage_of(self.answers, self.choices)
        note(request, **{name: usage[name] for name in ("prompt_tokens", "completion_tokens")})
        return usage
