"""POST /v1/responses: text in, text out, whole or as events. Nothing is stored, so nothing can be fetched later."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import perf_counter
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from ..answer import Answer, WholeAnswer, collected
from ..api_error import ApiError
from ..body import read_body
from ..event_stream import open_stream, unless_gone
from ..openapi import describes
from ..request_log import note
from ..service import Service, service_of
from .admission import admitted
from .chat import chat_prompt
from .chat_schema import ChatMessage
from .logprobs import output_logprobs
from .parameters import make_answers
from .response_events import ResponseEvents
from .responses_schema import ResponseEvent, ResponseObject, ResponseRequest

router = APIRouter()


@router.post(
    "/v1/responses",
    summary="Answer a conversation, in events",
    **describes(ResponseRequest, ResponseObject, chunk=ResponseEvent),
)
async def create_response(request: Request) -> Response:
    service, arrived = service_of(request), perf_counter()
    body = await read_body(request, ResponseRequest, service.config)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "'stream_options' needs 'stream' to be true.", code="invalid_value", param="stream_options")
    service.check_model(body.model)
    note(request, user=body.user, safety_identifier=body.safety_identifier, metadata=body.metadata)
    note(request, prompt_cache_key=body.prompt_cache_key)
    async with admitted(service):
        answer = await _answer(service, body, arrived)
    reply = ResponseReply(service, body, answer)
    if body.stream:
        return await open_stream(request.receive, reply.events(request), error_name="error")
    return await unless_gone(request.receive, reply.whole(request))


async def _answer(service: Service, body: ResponseRequest, arrived: float) -> Answer:
    service.ready()
    messages = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        messages.append(ChatMessage(role="user", content=body.input))
    else:
        messages += [ChatMessage(role=item.role, content=item.text) for item in body.input]
    prompt = await chat_prompt(service, messages, {}, "input")
    answers = make_answers(
        service,
        body,
        [prompt],
        max_tokens=body.max_output_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.include else None,
        arrived=arrived,
        prompt_param="input",
    )
    return answers[0]


class ResponseReply:
    """The response object in its stages."""

    def __init__(self, service: Service, body: ResponseRequest, answer: Answer) -> None:
        self.service, self.body, self.answer = service, body, answer
        self.tokenizer = service.text().tokenizer
        self.message_id = f"msg_{uuid.uuid4().hex}"
        sampling = answer.request.sampling
        self._fixed: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.model_name,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "store": False,
        }

    def begun(self) -> dict[str, Any]:
        """The response before its first token."""
        return {**self._fixed, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}

    def part(self, answer: WholeAnswer) -> dict[str, Any]:
        """The text part."""
        logprobs = output_logprobs(answer.tokens, self.tokenizer) if self.body.include else []
        return {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": logprobs}

    def item(self, answer: WholeAnswer) -> dict[str, Any]:
        """The message."""
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": "completed" if answer.finish_reason == "stop" else "incomplete",
            "content": [self.part(answer)],
        }

    def complete(self, answer: WholeAnswer, request: Request) -> dict[str, Any]:
        """The response with its answer, and its counts in the log."""
        is_whole = answer.finish_reason == "stop"
        prompt, new = len(self.answer.request.prompt_ids), self.answer.new_tokens
        note(request, prompt_tokens=prompt, completion_tokens=new)
        return {
            **self._fixed,
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self.item(answer)],
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": self.answer.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": new,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + new,
            },
        }

    async def whole(self, request: Request) -> Response:
        """The response in one JSON object."""
        (answer,) = await collected([self.answer], self.service.port)
        return Response(msgspec.json.encode(self.complete(answer, request)), media_type="application/json")

    async def events(self, request: Request) -> AsyncGenerator[bytes]:
        """The events of a streamed response."""
        events, answer = ResponseEvents(self), WholeAnswer()
        opened = False
        async with aclosing(self.answer.deltas(self.service.port)) as deltas:
            async for delta in deltas:
                answer.text += delta.text
                answer.tokens += delta.tokens
                answer.finish_reason = delta.finish_reason or answer.finish_reason
                head = b"" if opened else events.opening()
                opened = True
                yield head + events.delta(delta)
        yield events.closing(answer, self.complete(answer, request))
