"""The counts of tokens that an answer reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from ..answer import Answer


class PromptTokensDetails(BaseModel):
    """How many of the prompt's tokens came from the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and answers of a request; a prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(answers: Sequence[Answer], choices: int) -> dict[str, Any]:
    """The `usage` object. choices: answers per prompt; those to one prompt stand together"""
    firsts = answers[::choices]
    prompt = sum(len(answer.request.prompt_ids) for answer in firsts)
    completion = sum(answer.new_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in firsts)},
    }
