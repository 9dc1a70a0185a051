"""Log-probabilities in the two forms of the OpenAI API: that of chat completions and that of completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..answer import TokenRecord
from ..tokenizer import Tokenizer

# JSON has no infinity; the API shows an impossible token like this.
_LEAST = -9999.0


def chat_logprobs(records: Iterable[TokenRecord], tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` object of a chat completion's choice."""
    return {
        "content": [
            _token(record.id, record.logprobs.token, tokenizer)
            | {"top_logprobs": [_token(id, value, tokenizer) for id, value in _top(record)]}
            for record in records
        ],
        "refusal": None,
    }


def completion_logprobs(
    records: Sequence[TokenRecord], tokenizer: Tokenizer, top: int, first_offset: int
) -> dict[str, Any]:
    """The `logprobs` object of a completion's choice. first_offset: characters of an echoed prompt before the answer"""
    return {
        "tokens": [_name(record.id, tokenizer) for record in records],
        "token_logprobs": [_finite(record.logprobs.token) for record in records],
        "top_logprobs": [{_name(id, tokenizer): _finite(value) for id, value in _top(record)} for record in records]
        if top
        else None,
        "text_offset": [first_offset + record.offset for record in records],
    }


def output_logprobs(records: Iterable[TokenRecord], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The `logprobs` array of a part of a response."""
    return chat_logprobs(records, tokenizer)["content"]


def _top(record: TokenRecord) -> Iterable[tuple[int, float]]:
    return zip(record.logprobs.top_ids, record.logprobs.top, strict=True)


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _name(token_id: int, tokenizer: Tokenizer) -> str:
    """The token's text; a part of a character is spelt out in bytes, so that different tokens have different names."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
