"""What a checkpoint says about how its answers are drawn and where they end.

Sources: generation_config.json; eos_token of tokenizer_config.json; eos_token_id of config.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .. import ModelError
from .text_files import TextFiles
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of a checkpoint; None where it says nothing, and then the command or the request decides."""

    stop_token_ids: frozenset[int] = frozenset()
    """Every token that ends an answer, by any of the files."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None

    @staticmethod
    def load(files: TextFiles, tokenizer: Tokenizer) -> GenerationDefaults:
        """Reads the defaults of a checkpoint; `tokenizer` is its own, and knows the id of eos_token.

        Raises: ModelError for a damaged file, and for a value of the wrong type or out of its range.
        """
        path, raw = files.path("generation_config.json"), files.json("generation_config.json")
        stop_token_ids = _token_ids(raw, path) | _token_ids(files.json("config.json"), files.path("config.json"))
        if tokenizer.eos_id is not None:
            stop_token_ids |= {tokenizer.eos_id}
        return GenerationDefaults(
            stop_token_ids=stop_token_ids,
            temperature=_number(raw, "temperature", path, minimum=0),
            top_k=_integer(raw, "top_k", path, minimum=0),
            top_p=_number(raw, "top_p", path, minimum=0, maximum=1),
            min_p=_number(raw, "min_p", path, minimum=0, maximum=1),
            repetition_penalty=_number(raw, "repetition_penalty", path, above=0),
            do_sample=_boolean(raw, "do_sample", path),
            max_new_tokens=_integer(raw, "max_new_tokens", path, minimum=1),
        )


def _token_ids(raw: dict[str, Any], path: str) -> frozenset[int]:
    """eos_token_id: one id, a list of ids, or nothing."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_integer(token_id) and token_id >= 0 for token_id in ids):
        raise _wrong("eos_token_id", value, path, "a token id, or a list of them")
    return frozenset(ids)


def _number(
    raw: dict[str, Any],
    key: str,
    path: str,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    is_number = (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)
    if not is_number or value < minimum or value <= above or value > maximum:
        lower = f"of at least {minimum:g}" if math.isfinite(minimum) else f"above {above:g}"
        upper = f" and of at most {maximum:g}" if math.isfinite(maximum) else ""
        raise _wrong(key, value, path, f"a number {lower}{upper}")
    return float(value)


def _integer(raw: dict[str, Any], key: str, path: str, *, minimum: int) -> int | None:
    value = raw.get(key)
    if value is not None and not (_is_integer(value) and value >= minimum):
        raise _wrong(key, value, path, f"an integer of at least {minimum}")
    return value


def _boolean(raw: dict[str, Any], key: str, path: str) -> bool | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong(key, value, path, "true or false")
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(key: str, value: object, path: str, allowed: str) -> ModelError:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:60] + "..."
    return ModelError(f"{path}: {key} is {shown}", f"It has to be {allowed}; correct it, or download the file again.")
