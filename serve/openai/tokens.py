"""POST /tokenize and /detokenize: text to token ids and back, without the engine."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ..api_error import ApiError
from ..body import read_body
from ..openapi import describes
from ..service import Service, service_of
from .completions_schema import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest

router = APIRouter()


@router.post("/tokenize", summary="Turn text into token ids", **describes(TokenizeRequest, TokenizeAnswer))
async def tokenize(request: Request) -> TokenizeAnswer:
    service = service_of(request)
    body = await read_body(request, TokenizeRequest, service.config)
    service.check_model(body.model)
    tokenizer, special = service.text().tokenizer, body.add_special_tokens is not False
    ids = await service.in_thread(lambda: tokenizer.encode(body.prompt, special), len(body.prompt), "prompt")
    ready = service.port.ready
    return TokenizeAnswer(tokens=ids, count=len(ids), max_model_len=None if ready is None else ready.max_length)


@router.post("/detokenize", summary="Turn token ids into text", **describes(DetokenizeRequest, DetokenizeAnswer))
async def detokenize(request: Request) -> DetokenizeAnswer:
    service = service_of(request)
    body = await read_body(request, DetokenizeRequest, service.config)
    service.check_model(body.model)
    tokenizer, ids = service.text().tokenizer, body.tokens
    if ids and max(ids) >= (limit := _vocab_size(service)):
        raise ApiError(
            400, f"'tokens' holds {max(ids)}; token ids go from 0 to {limit - 1}.", code="invalid_value", param="tokens"
        )
    text = await service.in_thread(lambda: tokenizer.decode(ids, bool(body.skip_special_tokens)), len(ids), "tokens")
    return DetokenizeAnswer(prompt=text)


def _vocab_size(service: Service) -> int:
    """The model's vocabulary, which may be padded beyond the tokenizer's."""
    ready, own = service.port.ready, service.text().tokenizer.vocab_size
    return own if ready is None else max(own, ready.vocab_size)
