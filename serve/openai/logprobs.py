"""Log-probabilities in the two forms of the OpenAI API: that of chat completions and that of completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..answer import TokenRecord
from ..messages import Logprobs
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
        "top_logprobs": [_likeliest(record.id, record.logprobs, tokenizer) for record in records] if top else None,
        "text_offset": [first_offset + record.offset for record in records],
    }


def echoed_logprobs(
    ids: Sequence[int], told: Sequence[Logprobs], tokenizer: Tokenizer, top: int, text: str
) -> dict[str, Any]:
    """The same of an echoed prompt, whose first token has none. told: of its tokens behind the first"""
    stream = tokenizer.stream(skip_special_tokens=False)
    offsets, shown = [], 0
    for token_id in ids:
        offsets.append(min(shown, len(text)))
        if shown or token_id not in tokenizer.special_ids or text.startswith(_name(token_id, tokenizer)):
            shown += len(stream.push(token_id))
    return {
        "tokens": [_name(id, tokenizer) for id in ids],
        "token_logprobs": [None, *(_finite(each.token) for each in told)],
        "top_logprobs": [None, *(_likeliest(id, each, tokenizer) for id, each in zip(ids[1:], told, strict=True))]
        if top
        else None,
        "text_offset": offsets,
    }


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both, one behind the other."""
    return {name: value if value is None else value + second[name] for name, value in first.items()}


def _likeliest(token_id: int, told: Logprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest tokens, and the token itself where it is not among them."""
    named = {_name(id, tokenizer): _finite(value) for id, value in zip(told.top_ids, told.top, strict=True)}
    return named if token_id in told.top_ids else named | {_name(token_id, tokenizer): _finite(told.token)}


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
