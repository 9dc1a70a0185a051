"""The text side of a GGUF file: its metadata as the small files of the Hugging Face form.

Source: "Tokenizer" in docs/gguf.md of ggml; the defaults are those of llama.cpp's `llama_vocab`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer as Backend

from .. import CacheError, ModelError
from ..cache.config import CacheConfig
from ..cache.key import make_key, source_digest
from ..cache.store import Store
from ..runtime.gguf_file import Header
from ..runtime.gguf_index import read_header
from .gguf_tokenizer import CONTROL, Vocabulary, build_tokenizer

_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}
_ENDS = ("eos", "eot", "eom")
# Models end their turns with more tokens than the one that the metadata name; llama.cpp knows these by their text.
_END_TEXTS = {
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<EOT>",
}  # fmt: skip
_HINT = "Convert the checkpoint again, or put its tokenizer.json beside the file and give the folder as --model."
_NAMES = _CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"
_MODEL, _TEMPLATE = "tokenizer.ggml.model", "tokenizer.chat_template"


class GgufText:
    """What the metadata of one GGUF file say about text."""

    def __init__(self, file: Path, cache: CacheConfig | None = None) -> None:
        """Reads the header; raises WeightError when it is damaged.

        cache: where all that it says is kept once it has been made, which takes longer than reading it
        """
        self._file, self._cache = file, cache
        self._made = _MetadataText(read_header(file, cache))

    @cached_property
    def _parts(self) -> _Parts:
        return self._made.parts() if self._cache is None else _kept(self._made, Store.open(self._cache))

    @property
    def present(self) -> list[Path]:
        """None: the file is known by the checkpoint's identity already."""
        return []

    def path(self, name: str) -> str:
        return f"{self._file} (in the place of {name})"

    def json(self, name: str) -> dict[str, Any]:
        """tokenizer_config.json with special tokens and templates, generation_config.json with the stop tokens."""
        return dict(self._parts.json.get(name, {}))

    def templates(self) -> dict[str, str]:
        return {}

    def backend(self) -> Backend:
        """The tokenizer of the metadata: the embedded tokenizer.json where there is one, else built from its lists."""
        return self._parts.backend


@dataclass(frozen=True)
class _Parts:
    """The tokenizer, and JSON objects by the names of the files that they take the place of."""

    backend: Backend
    json: dict[str, dict[str, Any]]

    def encoded(self) -> bytes:
        """The objects in one line, and behind it the tokenizer: it is megabytes long, and is not quoted once more."""
        return b"\n".join((json.dumps(self.json).encode(), self.backend.to_str().encode()))

    @staticmethod
    def decoded(kept: bytes) -> _Parts:
        """Raises Exception of any kind for what cannot be read: the library raises bare ones."""
        objects, _, tokenizer = kept.partition(b"\n")
        read = json.loads(objects)
        return _Parts(Backend.from_buffer(tokenizer), {name: dict(read[name]) for name in _NAMES})


def _kept(made: _MetadataText, store: Store) -> _Parts:
    """The parts out of the store, by the file's header and all else that decides what they become."""
    sources = source_digest([Path(__file__), Path(__file__).with_name("gguf_tokenizer.py")])
    factors = {"gguf": made.header.sha256, "sources": sources, "tokenizers": tokenizers.__version__}
    name = make_key(factors).digest
    kept = store.lookup_derived(name)
    if kept is not None:
        try:
            return _Parts.decoded(kept)
        except Exception as error:
            store.quarantine_derived(name, CacheError(f"a kept tokenizer cannot be read: {error}", ""))
    parts = made.parts()
    store.publish_derived(name, parts.encoded(), "tokenizer")
    return parts


class _MetadataText:
    """Makes the parts."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._metadata = header.metadata

    def parts(self) -> _Parts:
        """Raises ModelError for metadata that do not fit each other."""
        backend, templates = self._backend(), self._chat_templates()
        config = self._special_tokens() | ({"chat_template": templates} if templates else {})
        return _Parts(backend, {_CONFIG: config, _GENERATION: {"eos_token_id": sorted(self._end_ids())}})

    def _backend(self) -> Backend:
        embedded = self._metadata.get("tokenizer.huggingface.json")
        try:
            return Backend.from_str(embedded) if isinstance(embedded, str) else build_tokenizer(self._vocabulary())
        except ModelError:
            raise
        except Exception as error:  # the library raises bare Exception for merges or tokens that do not fit each other
            raise self._damaged(f"the tokenizer cannot be built: {error}") from error

    @cached_property
    def _tokens(self) -> list[str]:
        """Decoded once: there are 128,000 of them in a file of today."""
        return self._texts("tokens")

    def _vocabulary(self) -> Vocabulary:
        model = self._text(_MODEL)
        if model not in ("gpt2", "llama"):
            raise self._damaged(f"the tokenizer is of the kind {model!r}; gpt2 and llama are known")
        tokens = self._tokens
        types = self._numbers("token_type", len(tokens)) or [1] * len(tokens)
        if model == "llama":
            scores = self._numbers("scores", len(tokens))
            if not scores:
                raise self._damaged("tokenizer.ggml.scores is missing")
            merges: list[str] = []
        else:
            scores, merges = [], self._texts("merges")
        return Vocabulary(
            kind="llama" if model == "llama" else "gpt2",
            pre=self._text("tokenizer.ggml.pre", "default"),
            tokens=tokens,
            types=types,
            scores=scores,
            merges=merges,
            special=self._ids(),
            add_bos=self._flag("add_bos_token"),
            add_eos=self._flag("add_eos_token"),
            add_space_prefix=self._flag("add_space_prefix"),
        )

    def _ids(self) -> dict[str, int]:
        """The token of each role, as far as the metadata give it."""
        count = len(self._sequence("tokens"))
        found = dict(_DEFAULT_IDS.get(self._metadata.get(_MODEL, ""), {}))
        for role in {*_ROLES, *_ENDS}:
            value = self._metadata.get(f"tokenizer.ggml.{role}_token_id")
            if value is None:
                continue
            if type(value) is not int or not 0 <= value < count:
                raise self._damaged(f"tokenizer.ggml.{role}_token_id is {value!r}, and there are {count} tokens")
            found[role] = value
        return {role: token_id for role, token_id in found.items() if token_id < count}

    def _special_tokens(self) -> dict[str, str]:
        ids = self._ids()
        tokens = self._tokens
        return {to: tokens[ids[role]] for role, to in _ROLES.items() if role in ids}

    def _end_ids(self) -> set[int]:
        ids, tokens = self._ids(), self._tokens
        types = self._numbers("token_type", len(tokens))
        named = {at for at, token in enumerate(tokens) if token in _END_TEXTS and types and types[at] == CONTROL}
        return named | {ids[role] for role in _ENDS if role in ids}

    def _chat_templates(self) -> str | list[dict[str, str]]:
        """The one template, or named ones where there are more."""
        default = self._text(_TEMPLATE, "")
        named = {
            key.removeprefix(f"{_TEMPLATE}."): self._text(key)
            for key in self._metadata
            if key.startswith(f"{_TEMPLATE}.")
        }
        if not named:
            return default
        templates = ({"default": default} if default else {}) | named
        return [{"name": name, "template": template} for name, template in templates.items()]

    def _text(self, key: str, default: str | None = None) -> str:
        value = self._metadata.get(key, default)
        if not isinstance(value, str):
            raise self._damaged(f"{key} is missing" if value is None else f"{key} is no text")
        return value

    def _flag(self, name: str) -> bool | None:
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and not isinstance(value, bool):
            raise self._damaged(f"tokenizer.ggml.{name} is {value!r}, neither true nor false")
        return value

    def _sequence(self, name: str) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        if value is None or isinstance(value, str) or not hasattr(value, "__len__"):
            raise self._damaged(f"tokenizer.ggml.{name} is {'missing' if value is None else 'no list'}")
        return value

    def _texts(self, name: str) -> list[str]:
        try:
            texts = list(self._sequence(name))
        except UnicodeDecodeError as error:
            raise self._damaged(f"tokenizer.ggml.{name} holds bytes that are no UTF-8: {error}") from None
        if texts and not isinstance(texts[0], str):
            raise self._damaged(f"tokenizer.ggml.{name} is no list of text")
        return texts

    def _numbers(self, name: str, count: int) -> list[Any]:
        """As many numbers as there are tokens, or none."""
        if f"tokenizer.ggml.{name}" not in self._metadata:
            return []
        values = list(self._sequence(name))
        if len(values) != count or not all(isinstance(value, int | float) for value in values):
            raise self._damaged(f"tokenizer.ggml.{name} is not one number for each of the {count} tokens")
        return values

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.header.file}: {what}", _HINT)
