"""Turns token ids into text one at a time, so that the pieces join to exactly what decoding all ids at once gives.

Three kinds of decoder need three streams:

    byte-level           every token is a run of UTF-8 bytes: an incremental UTF-8 decoder, constant work per token
    piece by piece       the text of a token depends on the one before it only: decode a short window
    anything else        later tokens may change earlier text: the text comes when the stream is flushed

Text differs between these only in when it arrives. A character is never split; bytes that are no UTF-8 become U+FFFD.
"""

from __future__ import annotations

import codecs
import json
import re
from functools import cache
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PIECEWISE_ALONE = {"Metaspace", "WordPiece", "BPEDecoder", "Fuse", "Replace", "ByteFallback", "Strip"}
_PIECEWISE_IN_SEQUENCE = {"Fuse", "Replace", "ByteFallback", "Strip"}


class TextStream(Protocol):
    """Completed text, token by token."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty. An id that the vocabulary lacks is passed over."""
        ...

    def flush(self) -> str:
        """The text still held, with U+FFFD for unfinished characters. Called once, at the end."""
        ...


def open_stream(backend: Backend, skipped_ids: frozenset[int]) -> TextStream:
    """The stream that fits the decoder of `backend`; tokens of `skipped_ids` give no text."""
    decoders = _decoder_sequence(backend)
    if [decoder["type"] for decoder in decoders] == ["ByteLevel"]:
        return _ByteStream(backend, skipped_ids)
    if _is_piecewise(decoders):
        has_byte_tokens = any(decoder["type"] == "ByteFallback" for decoder in decoders)
        return _WindowStream(backend, skipped_ids, has_byte_tokens)
    return _DeferredStream(backend, skipped_ids)


def token_bytes(backend: Backend, token_id: int) -> bytes:
    """The bytes that a token stands for where text goes before it; b"" for an id that the vocabulary lacks.

    They may be a part of a character. A space that a decoder drops at the start of a text is kept.
    """
    token = backend.id_to_token(token_id)
    if token is None:
        return b""
    kinds = {decoder["type"] for decoder in _decoder_sequence(backend)}
    if "ByteLevel" in kinds:
        return _token_bytes(token)
    if "ByteFallback" in kinds and _BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return (token.replace("\u2581", " ") if kinds & {"Metaspace", "Replace"} else token).encode()


class _ByteStream:
    """Byte-level tokens: maps each token to its bytes and decodes these incrementally."""

    def __init__(self, backend: Backend, skipped_ids: frozenset[int]) -> None:
        self._backend = backend
        self._skipped_ids = skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._skipped_ids:
            return ""
        return self._decoder.decode(_token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """Pieces that depend on the piece before: decodes each one behind a context and keeps what the context lacks.

    The context decodes to some text, so whatever the decoder does to the start of a text has been done within it.
    """

    def __init__(self, backend: Backend, skipped_ids: frozenset[int], has_byte_tokens: bool) -> None:
        self._backend = backend
        self._skipped_ids = skipped_ids
        self._has_byte_tokens = has_byte_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._skipped_ids:
            return ""
        self._pending.append(token_id)
        # A run of byte tokens is UTF-8 as a whole or not at all, so its text is known only when the run is over.
        if self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token):
            return ""
        return self._release()

    def flush(self) -> str:
        return self._release()

    def _release(self) -> str:
        window = self._context + self._pending
        text = self._decode(window)
        completed = text[len(self._context_text) :]
        tail = self._context[-1:] + self._pending
        tail_text = self._decode(tail)
        self._context, self._context_text = (tail, tail_text) if tail_text else (window, text)
        self._pending = []
        return completed

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class _DeferredStream:
    """A decoder that may rewrite text across tokens: nothing is certain before the end."""

    def __init__(self, backend: Backend, skipped_ids: frozenset[int]) -> None:
        self._backend = backend
        self._skipped_ids = skipped_ids
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id not in self._skipped_ids:
            self._ids.append(token_id)
        return ""

    def flush(self) -> str:
        ids, self._ids = self._ids, []
        return self._backend.decode(ids, skip_special_tokens=False)


def _decoder_sequence(backend: Backend) -> list[dict[str, Any]]:
    """The decoder as a flat list of its steps, as tokenizer.json spells them."""
    if backend.decoder is None:
        return []
    return _flatten(json.loads(backend.decoder.__getstate__()))


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flatten(inner)]


def _is_piecewise(decoders: list[dict[str, Any]]) -> bool:
    """Whether a token's text depends on nothing but the token before it (and on being the first)."""
    if len(decoders) <= 1:
        return all(decoder["type"] in _PIECEWISE_ALONE for decoder in decoders)
    is_fused = False
    for decoder in decoders:
        if decoder["type"] not in _PIECEWISE_IN_SEQUENCE:
            return False
        # Behind Fuse the text is one piece: only its start can be stripped without knowing its end.
        if is_fused and not (decoder["type"] == "Strip" and decoder["stop"] == 0):
            return False
        is_fused = is_fused or decoder["type"] == "Fuse"
    return True


def _token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token with a character outside the byte alphabet stands for itself."""
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable bytes stand for themselves, the others for U+0100 onwards (GPT-2, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(256 + rank): byte for rank, byte in enumerate(others)}
