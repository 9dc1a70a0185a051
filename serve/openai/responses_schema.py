"""What /v1/responses takes and answers: text in, text out, nothing stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..body import Schema
from ..messages import MAX_TOP_LOGPROBS
from .field_rules import between_fields, needs
from .field_types import AS_WHOLE, Label, Metadata, ModelName, OnlyFalse, PositiveCount, Refused
from .parameters import StreamOptions


class InputText(Schema):
    """Text of a message; `output_text` stands in messages that the model wrote."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Schema):
    """One message of the conversation so far. An output item of an earlier response can be sent as it came."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputText], Field(min_length=1, max_length=1024)]
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Refused = None

    @property
    def text(self) -> str:
        """The content; parts are joined with newlines."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class PlainText(Schema):
    """The form of the answer; only free text is supported."""

    type: Literal["text"]


class TextSettings(Schema):
    """The form and the length of the answer."""

    format: PlainText | None = None
    verbosity: Literal["medium"] | None = None


class ResponseRequest(Schema):
    """The body of /v1/responses."""

    model_config = between_fields(needs("stream_options", "stream"))

    model: ModelName | None = None
    input: Annotated[str, Field(min_length=1)] | Annotated[list[InputMessage], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    """Stands before the conversation as a system message."""
    max_output_tokens: PositiveCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), AS_WHOLE] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    text: TextSettings | None = None
    store: OnlyFalse | None = None
    background: OnlyFalse | None = None
    parallel_tool_calls: bool | None = None
    """Without tools, both values mean the same."""
    service_tier: Literal["auto", "default"] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    truncation: Literal["disabled"] | None = None
    context_management: Refused = None
    conversation: Refused = None
    max_tool_calls: Refused = None
    moderation: Refused = None
    previous_response_id: Refused = None
    prompt: Refused = None
    prompt_cache_options: Refused = None
    prompt_cache_retention: Refused = None
    reasoning: Refused = None


class OutputText(BaseModel):
    """The text of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    """The model's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class InputTokensDetails(BaseModel):
    """How many of the prompt's tokens came from the prefix cache; writing to it is not counted apart."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """Tokens that are not shown; there are none."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """The counts of tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    """The answer of /v1/responses; with `stream`, it comes as the events of the OpenAI API."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    metadata: dict[str, str]
    parallel_tool_calls: bool
    tool_choice: Literal["none", "auto"]
    tools: list[Any]
    store: bool
    error: None = None


class ResponseEvent(BaseModel):
    """One event of a streamed response; its type says which of the other fields it has."""

    model_config = ConfigDict(extra="forbid")

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
    ]
    sequence_number: int
    response: ResponseObject | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: OutputMessage | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    logprobs: list[Any] | None = None
