"""Builds a tokenizer from the lists of a GGUF file, as the Hugging Face form of the same checkpoint has it.

Two kinds are known: byte-level BPE ("gpt2"), whose merges are listed and whose text is first split by a pattern that
the file names, and SentencePiece BPE ("llama"), whose merges follow from the scores of its pieces.

Source: `llm_tokenizer_bpe` and `llm_tokenizer_spm` of llama.cpp; the patterns are those of the checkpoints' own
tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

from .. import ModelError

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
"""Types of tokens that are not plain text."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_CODE = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")

_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    "tekken": _TEKKEN,
    "deepseek-coder": _CODE,
}
"""`tokenizer.ggml.pre` -> the patterns that split text, one after the other."""
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r"}
"""Those that take digits one by one and then split as GPT-2 does."""
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
"""Those that take a word of the vocabulary whole, whatever its merges give, and open a text by default."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file lists: None where it says nothing, and the kind decides.

    types, scores: one for each token; special: role ("bos", "eos", "unknown", ...) -> token
    """

    kind: Literal["gpt2", "llama"]
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None


def build_tokenizer(vocabulary: Vocabulary) -> Backend:
    """The tokenizer; raises ModelError for a pattern that is not known, and what the library raises for wrong lists."""
    backend = _byte_level(vocabulary) if vocabulary.kind == "gpt2" else _sentence_piece(vocabulary)
    backend.add_special_tokens([_added(token) for token in _of_type(vocabulary, CONTROL, UNKNOWN)])
    backend.add_tokens([_added(token) for token in _of_type(vocabulary, USER_DEFINED)])
    _open_and_close(backend, vocabulary)
    return backend


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _of_type(vocabulary: Vocabulary, *types: int) -> Iterator[str]:
    return (token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in types)


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Token -> id; the fillers that a converter puts into gaps are not reachable by text, and left out."""
    listed = enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    return {token: at for at, (token, kind) in listed if kind != UNUSED}


def _byte_level(vocabulary: Vocabulary) -> Backend:
    # A merge is two tokens with a space between; a token may begin with one, as no text is split before its second.
    cuts = ((merge, merge.find(" ", 1)) for merge in vocabulary.merges)
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]
    whole = vocabulary.pre in _WHOLE_WORDS
    backend = Backend(models.BPE(vocab=_ids(vocabulary), merges=merges, ignore_merges=whole))
    if vocabulary.pre in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _splitter(vocabulary.pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _splitter(pre: str) -> PreTokenizer:
    if pre == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    if pre in _DIGITS_APART:
        return pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if pre not in _PATTERNS:
        known = sorted({*_PATTERNS, *_DIGITS_APART})
        raise ModelError(
            f"the tokenizer splits text as {pre!r} does, which is not known",
            f"Known are {', '.join(known)}. Put the checkpoint's tokenizer.json beside the file and give the folder.",
        )
    splits: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in _PATTERNS[pre]]
    return pre_tokenizers.Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentence_piece(vocabulary: Vocabulary) -> Backend:
    unknown = vocabulary.special.get("unknown")
    ids = _ids(vocabulary)
    model = models.BPE(
        vocab=ids,
        merges=_merges(vocabulary, ids),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    prefix = vocabulary.add_space_prefix is not False
    marks = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    opening = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *opening]
    )
    return backend


def _merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, those that give the piece of the highest score first.

    SentencePiece joins the neighbours whose union has the highest score, which is what merges in this order do.
    """
    found: list[tuple[float, int, int, str, str]] = []
    for token, at in ids.items():
        if vocabulary.types[at] in (CONTROL, UNKNOWN):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-vocabulary.scores[at], ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _open_and_close(backend: Backend, vocabulary: Vocabulary) -> None:
    """Puts the tokens around a text that the file asks for, or that its kind has where it says nothing."""
    opens_by_default = vocabulary.kind == "llama" or vocabulary.pre in _WHOLE_WORDS
    add_bos = opens_by_default if vocabulary.add_bos is None else vocabulary.add_bos
    roles = {"bos": add_bos, "eos": bool(vocabulary.add_eos)}
    around = {role: vocabulary.special[role] for role, wanted in roles.items() if wanted and role in vocabulary.special}
    if not around:
        return
    names = {role: vocabulary.tokens[token_id] for role, token_id in around.items()}
    open_text, close_text = names.get("bos", ""), names.get("eos", "")
    backend.post_processor = processors.TemplateProcessing(
        single=[part for part in (open_text, "$A", close_text) if part],
        pair=[part for part in (open_text, "$A", close_text, open_text, "$B", close_text) if part],
        special_tokens=list({names[role]: token_id for role, token_id in around.items()}.items()),
    )
