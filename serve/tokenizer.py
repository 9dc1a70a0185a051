"""Text to token ids and back, from a checkpoint's tokenizer.json; needs no transformers.

As in transformers 5, tokenizer.json alone says which tokens open and close a text: add_bos_token and add_eos_token of
tokenizer_config.json, which older releases obeyed for some model types, have no say beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from .. import ModelError, RequestError
from .detokenize import TextStream, open_stream, token_bytes
from .text_files import TextFiles
from .token_bound import most_bytes_per_token


class Tokenizer:
    """A checkpoint's tokenizer. Safe to use from several threads; every stream belongs to one request."""

    def __init__(self, backend: Backend, special_tokens: dict[str, str] | None = None) -> None:
        """`special_tokens` names tokens by role: bos_token, eos_token, pad_token, ... -> the token's text."""
        self._backend = backend
        self.special_tokens = special_tokens or {}
        self._bytes: dict[int, bytes] = {}
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @staticmethod
    def load(files: TextFiles) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and special_tokens_map.json (the last two may be absent).

        Raises: ModelError when there is no tokenizer, or when a file is damaged.
        """
        backend = files.backend()
        # Both are settings of training runs: they would cut long prompts or fill up short ones.
        backend.no_truncation()
        backend.no_padding()
        special_tokens = read_special_tokens(files)
        _add_listed_tokens(backend, files)
        _mark_special(backend, special_tokens.values())
        return Tokenizer(backend, special_tokens)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included. The model's own vocabulary may be padded to more."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if the checkpoint names one; generation_config.json may list more of them."""
        return self._id_of("eos_token")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of `text`; `add_special_tokens` opens and closes it as the checkpoint says.

        A rendered chat template brings its own special tokens, spelt out in the text, and needs False.
        Raises: RequestError when `text` holds lone surrogates, which are not text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: a lone surrogate at character {error.start}",
                "Send text whose \\u escapes form complete characters.",
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def least_tokens(self, text: str) -> int:
        """How many tokens `text` has at least, told without cutting it."""
        most = self._most_bytes_per_token
        return 0 if most is None else len(text.encode(errors="replace")) // most

    @cached_property
    def _most_bytes_per_token(self) -> int | None:
        return most_bytes_per_token(self._backend)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, and unknown ids are passed over."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps a part of a character; a special token's are its name."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = token_bytes(self._backend, token_id)
        return found

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A stream whose pieces join to what `decode` gives for the same ids."""
        return open_stream(self._backend, self.special_ids if skip_special_tokens else frozenset())

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)


def read_special_tokens(files: TextFiles) -> dict[str, str]:
    """Role (bos_token, eos_token, ...) -> token; tokenizer_config.json wins over special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role, token in files.json(name).items():
            if role.endswith("_token") and isinstance(text := _token_text(token), str):
                found[role] = text
    return found


def _token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _add_listed_tokens(backend: Backend, files: TextFiles) -> None:
    """Adds the tokens of `added_tokens_decoder` that tokenizer.json lacks, each at the id that it is listed under."""
    config = "tokenizer_config.json"
    listed = files.json(config).get("added_tokens_decoder") or {}
    try:
        entries = sorted((int(token_id), dict(entry)) for token_id, entry in listed.items())
        tokens = [
            (token_id, AddedToken(entry.pop("content"), **{k: v for k, v in entry.items() if k in _TOKEN_FLAGS}))
            for token_id, entry in entries
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{files.path(config)}: added_tokens_decoder is damaged ({error})",
            "It maps token ids to objects with `content`. Download the file again.",
        ) from error
    known = backend.get_added_tokens_decoder()
    for token_id, token in tokens:
        if token_id in known:
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ModelError(
                f"{files.path('tokenizer.json')} and {config} disagree: {token.content!r} is token "
                f"{backend.token_to_id(token.content)} in the one and {token_id} in the other",
                "Download both files again, from one revision of the checkpoint.",
            )


_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _mark_special(backend: Backend, tokens: Iterable[str]) -> None:
    """Marks tokens with a role as special, so that they are not shown; the vocabulary may lack some of them."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in tokens
            if token not in added and backend.token_to_id(token) is not None
        ]
    )
