"""Fields that the generating routes share, and from them what the engine is asked for."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from pydantic import Field

from ... import MaxError
from ...runtime.config import SamplingConfig
from ..answer import Answer
from ..api_error import ApiError, from_max_error
from ..body import Schema
from ..messages import Ready, Sampling, Submit
from ..openapi_bounds import OF_MODEL
from ..service import Service, too_long
from ..text_output import MAX_STOPS, StopRules
from ..text_side import TextSide
from .field_types import ALL_AS_WHOLE, AS_WHOLE, AnswerCount, Count, Label, ModelName, OnlyFalse, StopText, TokenId

MAX_CHOICES = 128
_SEED_MASK = (1 << 64) - 1
_LEAST_TOP_P = 1e-9

LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024, json_schema_extra={OF_MODEL: "bias"}),
]


class StreamOptions(Schema):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    """Send the counts of tokens in a last chunk, whose `choices` is empty."""
    include_obfuscation: OnlyFalse | None = None
    """Random padding of chunks is not supported."""


class GenerationFields(Schema):
    """Fields of chat completions and completions alike. null stands for a field that is left out."""

    model: ModelName | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), AS_WHOLE] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), AS_WHOLE] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: LogitBias | None = None
    user: Label | None = None
    """Written to the log line of the request."""

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), AS_WHOLE] | None = None
    """Draw from the k most likely tokens; 0 or -1 draws from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Divide the logits of tokens seen in prompt or answer."""
    min_tokens: AnswerCount | None = None
    """Tokens of the answer, at least."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256), ALL_AS_WHOLE] | None = None
    """Token ids that end the answer and are not shown."""
    ignore_eos: bool | None = None
    """Go on when the model ends its answer."""
    cache_salt: Label | None = None
    """Prompts share cached pages with those of the same salt only."""


def sampling_of(fields: Any, text: TextSide, service: Service, vocab_size: int) -> Sampling:
    """How tokens are drawn: what the request says, else the server's settings, else the checkpoint's defaults.

    fields: a request; those of the shared fields that it lacks count as left out
    Raises ApiError naming the field.
    """

    def given(name: str) -> Any:
        return getattr(fields, name, None)

    def else_server(name: str) -> Any:
        return given(name) if given(name) is not None else getattr(service.config, name)

    _check_features(fields, service)
    top_p, seed = given("top_p"), given("seed")
    try:
        params = text.sampling(
            SamplingConfig(
                temperature=else_server("temperature"),
                top_k=else_server("top_k"),
                top_p=None if top_p is None else max(top_p, _LEAST_TOP_P),
                min_p=given("min_p"),
                repetition_penalty=given("repetition_penalty") if service.config.enable_penalties else 1.0,
                frequency_penalty=given("frequency_penalty") or 0.0,
                presence_penalty=given("presence_penalty") or 0.0,
                seed=None if seed is None else seed & _SEED_MASK,
            )
        )
    except MaxError as error:
        raise from_max_error(error) from error
    return Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=params.seed,
        bias=_bias(given("logit_bias") or {}, vocab_size),
    )


_WITHOUT_EFFECT: dict[str, tuple[str, float]] = {
    "frequency_penalty": ("enable_penalties", 0),
    "presence_penalty": ("enable_penalties", 0),
    "repetition_penalty": ("enable_penalties", 1),
    "min_tokens": ("enable_min_tokens", 0),
}
"""Fields that a setting switches off, and the value that asks for nothing."""


def _check_features(fields: Any, service: Service) -> None:
    """Raises ApiError for what this server does not take."""
    for name, (feature, neutral) in _WITHOUT_EFFECT.items():
        if getattr(fields, name, None) not in (None, neutral) and not getattr(service.config, feature):
            raise switched_off(name, feature)


def switched_off(field: str, feature: str) -> ApiError:
    """The refusal of a field that the server was started without."""
    flag = f"--no-{feature.replace('_', '-')}"
    return ApiError(400, f"'{field}' is switched off here by {flag}.", code="unsupported_parameter", param=field)


def _bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise ApiError(
                400,
                f"'logit_bias' has the key {key[:40]!r}, which is no token id; they go from 0 to {vocab_size - 1}.",
                code="invalid_value",
                param="logit_bias",
            )
        bias[int(key)] = value
    return bias


def stop_rules(fields: Any, text: TextSide, room: int, vocab_size: int, max_tokens: int | None) -> StopRules:
    """Where an answer ends. room: tokens that the context has left. Raises ApiError naming the field."""
    stop = getattr(fields, "stop", None) or ()
    stop_token_ids = tuple(getattr(fields, "stop_token_ids", None) or ())
    min_tokens = getattr(fields, "min_tokens", None) or 0
    limit = room if max_tokens is None else min(room, max_tokens)
    if min_tokens > limit:
        raise ApiError(
            400,
            f"'min_tokens' is {min_tokens}, and the answer has room for {limit} tokens.",
            code="invalid_value",
            param="min_tokens",
        )
    config = SamplingConfig(
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(getattr(fields, "ignore_eos", None)),
    )
    try:
        return text.stop_rules(config, room, vocab_size)
    except MaxError as error:
        raise from_max_error(error, "stop_token_ids" if stop_token_ids else None) from error


def make_answers(
    service: Service,
    fields: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | None,
    top_logprobs: int | None,
    arrived: float,
    prompt_param: str,
    prompt_logprobs: bool = False,
) -> list[Answer]:
    """`n` answers to each prompt, ready to be asked for; answers to one prompt differ by their seeds.

    Raises ApiError for a prompt that does not fit or holds ids that the model lacks.
    """
    text, ready = service.text(), service.ready()
    sampling = sampling_of(fields, text, service, ready.vocab_size)
    choices = getattr(fields, "n", None) or 1
    answers: list[Answer] = []
    for prompt in prompts:
        room = _room(prompt, ready, prompt_param)
        rules = stop_rules(fields, text, room, ready.vocab_size, max_tokens)
        for choice in range(choices):
            submit = Submit(
                id=uuid.uuid4().hex,
                prompt_ids=list(prompt),
                sampling=_reseeded(sampling, choice),
                max_new_tokens=rules.max_new_tokens,
                min_new_tokens=rules.min_new_tokens,
                stop_token_ids=sorted(rules.ending_token_ids),
                ignore_eos=False,
                top_logprobs=top_logprobs,
                cache_salt=getattr(fields, "cache_salt", None) or "",
                prompt_logprobs=prompt_logprobs,
            )
            answers.append(Answer(len(answers), submit, rules, text.tokenizer, service.metrics, arrived))
    return answers


def _reseeded(sampling: Sampling, choice: int) -> Sampling:
    if choice == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + choice) & _SEED_MASK)


def _room(prompt: Sequence[int], ready: Ready, param: str) -> int:
    if not prompt:
        raise ApiError(400, "The prompt has no tokens.", code="invalid_value", param=param)
    if max(prompt) >= ready.vocab_size:
        raise ApiError(
            400,
            f"The prompt holds the token id {max(prompt)}, and the model has no such token; its ids go from 0 to "
            f"{ready.vocab_size - 1}.",
            code="invalid_value",
            param=param,
        )
    room = ready.max_length - len(prompt)
    if room < 1:
        raise too_long(len(prompt), ready.max_length, param)
    return room
