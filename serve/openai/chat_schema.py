"""What /v1/chat/completions takes and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ..body import Schema
from ..messages import MAX_TOP_LOGPROBS
from .field_rules import between_fields, needs
from .field_types import AS_WHOLE, Label, Metadata, OnlyFalse, PositiveCount, Refused
from .parameters import GenerationFields
from .usage import Usage


class TextPart(Schema):
    """A part of a message's content. Images, audio and files are not supported."""

    type: Literal["text"]
    text: str


class ChatMessage(Schema):
    """One message. A developer's message is a system message by a newer name."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    name: Label | None = None
    refusal: Refused = None
    tool_calls: Refused = None
    function_call: Refused = None
    audio: Refused = None
    annotations: Refused = None

    @property
    def text(self) -> str:
        """The content; parts are joined with newlines."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class TextFormat(Schema):
    """The form of the answer; only free text is supported."""

    type: Literal["text"]


RESERVED_VARIABLES = ("add_generation_prompt", "messages", "self", "tools")
"""What a template is given by the server itself."""

TemplateVariables = Annotated[
    dict[str, Any],
    Field(max_length=64, json_schema_extra={"propertyNames": {"not": {"enum": list(RESERVED_VARIABLES)}}}),
]


class ChatRequest(GenerationFields):
    """The body of /v1/chat/completions."""

    model_config = between_fields(needs("top_logprobs", "logprobs"), needs("stream_options", "stream"))

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: PositiveCount | None = None
    max_tokens: PositiveCount | None = None
    """An older name of max_completion_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), AS_WHOLE] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    """Variables for the model's chat template, such as enable_thinking."""
    safety_identifier: Label | None = None
    """Written to the log line of the request, as are prompt_cache_key and metadata."""
    prompt_cache_key: Label | None = None
    metadata: Metadata | None = None

    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: OnlyFalse | None = None
    tool_choice: Literal["none"] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    tools: Refused = None
    parallel_tool_calls: Refused = None
    functions: Refused = None
    function_call: Refused = None
    audio: Refused = None
    prediction: Refused = None
    moderation: Refused = None
    prompt_cache_options: Refused = None
    prompt_cache_retention: Refused = None
    web_search_options: Refused = None
    chat_template: Refused = None


class TopLogprob(BaseModel):
    """A token that could have come, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, beside the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of an answer's tokens."""

    content: list[TokenLogprob] | None
    refusal: None = None


class AnswerMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions; with `stream`, it comes as chat.completion.chunk events instead."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    choices: list[ChatChoice]
    usage: Usage


class ChunkDelta(BaseModel):
    """What is new: the role in the first chunk of a choice, then text."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(BaseModel):
    """One of the `n` answers, as far as this chunk has it; the last of a choice says why it ended."""

    index: int
    delta: ChunkDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed chat completion. `usage` stands in the last where it is asked for, null before it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    choices: list[ChunkChoice]
    usage: Usage | None = None
