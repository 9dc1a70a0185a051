"""What /v1/completions takes and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from ..body import Schema
from ..messages import MAX_TOP_LOGPROBS
from .field_rules import best_of_one, between_fields, needs, zero_needs_echo
from .field_types import ALL_AS_WHOLE, AS_WHOLE, ModelName, PromptText, Refused, TokenId, TokenPrompt
from .parameters import GenerationFields
from .usage import Usage

MAX_PROMPTS = 256
_FORMS = {str: "texts", int: "tokens", float: "tokens", list: "token lists"}


def _form(prompt: Any) -> str | None:
    """Which of its forms a prompt has, told by its first item, so that an error names the item that is wrong."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    return _FORMS.get(type(first), "text" if type(prompt) is str else None)


Prompt = Annotated[
    Annotated[PromptText, Tag("text")]
    | Annotated[TokenPrompt, Tag("tokens")]
    | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[list[TokenPrompt], Field(min_length=1, max_length=MAX_PROMPTS), Tag("token lists")],
    Discriminator(
        _form,
        custom_error_type="prompt_form",
        custom_error_message="should be text, a list of token ids, or a list of either",
    ),
]


class CompletionRequest(GenerationFields):
    """The body of /v1/completions."""

    model_config = between_fields(needs("stream_options", "stream"), zero_needs_echo(), best_of_one())

    prompt: Prompt
    """Text, token ids, or several of either."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), AS_WHOLE] | None = None
    """Report the log-probabilities of the answer's tokens and of so many alternatives."""
    echo: bool | None = None
    """Put the prompt before the answer."""
    best_of: Annotated[int, Field(ge=1), AS_WHOLE] | None = None
    """Only the value of `n` is supported."""
    suffix: Refused = None


class CompletionLogprobs(BaseModel):
    """The log-probabilities of an answer's tokens, in parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of an echoed prompt, as nothing comes before it."""
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer to one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The answer of /v1/completions; with `stream`, it comes as text_completion events instead."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(BaseModel):
    """One answer, as far as this chunk has it; the last of a choice says why it ended."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(BaseModel):
    """One event of a streamed completion. `usage` stands in the last where it is asked for, null before it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class TokenizeRequest(Schema):
    """The body of /tokenize."""

    model: ModelName | None = None
    prompt: PromptText
    add_special_tokens: bool | None = None
    """Open and close the text as the model's tokenizer does; true unless it is given."""


class TokenizeAnswer(BaseModel):
    """The tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int | None


class DetokenizeRequest(Schema):
    """The body of /detokenize."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], ALL_AS_WHOLE]
    skip_special_tokens: bool | None = None
    """Leave out tokens that are not text; false unless it is given."""


class DetokenizeAnswer(BaseModel):
    """The text of tokens."""

    prompt: str
