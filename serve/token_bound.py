"""How much text a token stands for at most: a prompt of megabytes is too long whatever its tokens are.

Cutting it takes a second for each megabyte, so that a few such requests would hold up all others.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

_KEEPING = {"ByteLevel", "Metaspace", "Digits", "Punctuation"}
_SHRINKS = {"NFC": 4}
"""How many bytes become one at most: three Hangul letters of 9 bytes compose one of 3, and Greek letters no more."""


def most_bytes_per_token(backend: Backend) -> int | None:
    """The bytes of UTF-8 that a token stands for at most; None for a tokenizer that drops text, or may."""
    vocab = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added) or not _has_every_byte(backend, vocab):
        return None
    if not all(_keeps(step) for step in _steps(backend.pre_tokenizer, "pretokenizers")):
        return None
    shrinking = 1
    for step in _steps(backend.normalizer, "normalizers"):
        if step["type"] in _SHRINKS:
            shrinking *= _SHRINKS[step["type"]]
        elif not _only_adds(step):
            return None
    return shrinking * max(len(token.encode(errors="replace")) for token in vocab)


def _has_every_byte(backend: Backend, vocab: dict[str, int]) -> bool:
    """Whether there is a token for whatever a text holds: BPE drops what it has none for, or joins it to one."""
    if not isinstance(backend.model, models.BPE):
        return False
    if any(step["type"] == "ByteLevel" for step in _steps(backend.pre_tokenizer, "pretokenizers")):
        return all(character in vocab for character in pre_tokenizers.ByteLevel.alphabet())
    return backend.model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256))


def _keeps(step: dict[str, Any]) -> bool:
    return step["type"] in _KEEPING or (step["type"] == "Split" and step["behavior"] != "Removed")


def _only_adds(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and len(step["content"].encode()) >= len(pattern.encode())
    return step["type"] == "Prepend"


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """A part of a tokenizer as a flat list of its steps, as tokenizer.json spells them."""
    if part is None:
        return []
    steps, flat = [json.loads(part.__getstate__())], []
    while steps:
        step = steps.pop(0)
        if step["type"] == "Sequence":
            steps = [*step[inner], *steps]
        else:
            flat.append(step)
    return flat
