"""Tokenizers built from the lists of GGUF files: beside those that were listed, and beside SentencePiece's rule."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from max import ModelError
from max.serve.chat_template import ChatTemplate
from max.serve.generation_defaults import GenerationDefaults
from max.serve.gguf_text import GgufText
from max.serve.tokenizer import Tokenizer

CORPUS = [
    "The cat's 12 hats aren't 3456 dogs, she'd said: \"I'LL go!\"\n\n  Then -- they've left at 7:45pm.",
    "def function(x_1):\n\treturn x_1 ** 2  # naïve café Ünïcödé 你好 世界 ελληνικά",
    "aaaa aaa aa a  bb bbb the the the then them theme there their and ant any answer 1999 2024 100000",
] * 30
TEXT = st.text(max_size=40) | st.text("abcdeht'sS 019\n\t.,-你\u0301éÉ<|>", max_size=60) | st.sampled_from(CORPUS)
SPECIAL = ("<s>", "</s>")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


# As transformers publishes these: pre-tokenizer, whether words of the vocabulary are taken whole, normalizer.
ORIGINALS: dict[str, tuple[Any, bool, Any]] = {
    "gpt-2": (GPT2, False, None),
    "llama-bpe": (split(LLAMA3), True, None),
    "qwen2": (split(QWEN2), False, normalizers.NFC()),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False, None),
}


def write(file: Path, **metadata: Any) -> GgufText:
    """A GGUF file of metadata alone; None leaves a key out."""
    writer = gguf.GGUFWriter(file, "llama")
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in metadata.items():
        if value is not None:
            kinds[type(value)](f"tokenizer.{key}".replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufText(file)


def byte_level(pre: str) -> Backend:
    splitter, whole, normalizer = ORIGINALS[pre]
    backend = Backend(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=450, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),  # type: ignore[call-arg]
    )
    return backend


def lists_of(backend: Backend) -> dict[str, Any]:
    """The lists that a converter writes for a byte-level tokenizer."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "ggml__model": "gpt2",
        "ggml__tokens": tokens,
        "ggml__token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "ggml__merges": [" ".join(pair) for pair in model["merges"]],
        "ggml__bos_token_id": 0,
        "ggml__eos_token_id": 1,
    }


@pytest.fixture(scope="module", params=ORIGINALS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Backend, Tokenizer]:
    original = byte_level(request.param)
    file = tmp_path_factory.mktemp("bpe") / "m.gguf"
    return original, Tokenizer.load(
        write(file, ggml__pre=request.param, ggml__add_bos_token=False, **lists_of(original))
    )


@settings(max_examples=settings().max_examples * 5 // 2)
@given(text=TEXT)
def test_byte_level_tokenizers_come_back_as_they_were(pair: tuple[Backend, Tokenizer], text: str) -> None:
    original, ours = pair
    ids = original.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=True) == ids
    assert ours.decode(ids) == original.decode(ids)
    stream = ours.stream()
    assert "".join(stream.push(token) for token in ids) + stream.flush() == ours.decode(ids)


# --- SentencePiece


def pieces() -> tuple[list[str], list[float], list[int]]:
    """Pieces with falling scores, as SentencePiece lists them: control, bytes, then what was joined first."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))  # type: ignore[call-arg]
    vocab = backend.get_vocab()
    learned = [token for token in sorted(vocab, key=vocab.__getitem__) if "é" not in token]  # left to its bytes
    joined = [token for token in learned if len(token) > 1]
    letters = [token for token in learned if len(token) == 1]
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*start, *joined, *letters, "<|user|>"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(joined) + len(letters)), 4]
    scores = [*[0.0] * len(start), *(-float(at) for at in range(len(joined) + len(letters))), 0.0]
    return tokens, scores, types


def joined_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's rule: of neighbours whose union is a piece, join those of the highest score, leftmost first."""
    ids = {token: at for at, token in enumerate(tokens)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(-scores[ids[a + b]], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not unions:
            break
        _, at = min(unions)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        token
        for part in parts
        for token in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, list[str], list[float]]:
    tokens, scores, types = pieces()
    file = tmp_path_factory.mktemp("spm") / "m.gguf"
    lists = {"ggml__tokens": tokens, "ggml__scores": scores, "ggml__token_type": types}
    return Tokenizer.load(write(file, ggml__model="llama", **lists)), tokens, scores


@settings(max_examples=4 * settings().max_examples)
@given(text=TEXT.filter(lambda text: text and "<" not in text))
def test_pieces_are_joined_by_score(sentence_piece: tuple[Tokenizer, list[str], list[float]], text: str) -> None:
    ours, tokens, scores = sentence_piece
    wanted = joined_by_score(text, tokens, scores)
    assert ours.encode(text, add_special_tokens=False) == wanted
    assert ours.encode(text, add_special_tokens=True) == [1, *wanted]
    assert ours.decode(wanted) == text.replace("▁", " "), "the mark of a space cannot be told from one"


def test_pieces_have_roles(sentence_piece: tuple[Tokenizer, list[str], list[float]]) -> None:
    ours, tokens, _ = sentence_piece
    assert ours.eos_id == 2 and ours.special_ids == {0, 1, 2}
    user = tokens.index("<|user|>")
    ids = ours.encode("a<|user|>b</s>", add_special_tokens=False)
    assert user in ids and ids[-1] == 2
    assert "<|user|>" in ours.decode(ids) and "</s>" not in ours.decode(ids)
    stream = ours.stream()
    assert "".join(stream.push(token) for token in ids) + stream.flush() == ours.decode(ids)


def test_a_text_may_do_without_a_space_before_it_and_have_an_end(tmp_path: Path) -> None:
    tokens, scores, types = pieces()
    lists = {"ggml__tokens": tokens, "ggml__scores": scores, "ggml__token_type": types}
    flags = {"ggml__add_space_prefix": False, "ggml__add_bos_token": False, "ggml__add_eos_token": True}
    ours = Tokenizer.load(write(tmp_path / "m.gguf", ggml__model="llama", **lists, **flags))
    ids = ours.encode("the", add_special_tokens=True)
    assert ids[-1] == 2 and not tokens[ids[0]].startswith("▁") and ours.decode(ids) == "the"


# --- what else the metadata say


def plain(**changed: Any) -> dict[str, Any]:
    tokens = ["<s>", "</s>", "<|eot_id|>", "a", "b", "ab", "<filler>"]
    lists = {"ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__tokens": tokens, "ggml__merges": ["a b"]}
    return lists | {"ggml__token_type": [3, 3, 3, 1, 1, 1, 5], "ggml__eos_token_id": 1} | changed


def test_every_token_that_ends_a_turn_is_a_stop_token(tmp_path: Path) -> None:
    def stops(**changed: Any) -> set[int]:
        text = write(tmp_path / "m.gguf", **plain(**changed))
        return set(GenerationDefaults.load(text, Tokenizer.load(text)).stop_token_ids)

    assert stops() == {1, 2}  # </s> by its id, <|eot_id|> by its text
    assert stops(ggml__token_type=[3, 3, 1, 1, 1, 1, 1]) == {1}
    assert stops(ggml__eot_token_id=4, ggml__eom_token_id=5) == {1, 2, 4, 5}


def test_fillers_are_no_text_and_an_embedded_tokenizer_wins(tmp_path: Path) -> None:
    ours = Tokenizer.load(write(tmp_path / "m.gguf", **plain()))
    assert ours.encode("ab", add_special_tokens=True) == [5] and ours.decode([6]) == ""
    embedded = Backend(models.WordLevel({"word": 0, "?": 1}, unk_token="?")).to_str()
    ours = Tokenizer.load(write(tmp_path / "m.gguf", huggingface__json=embedded, **plain()))
    assert ours.encode("word", add_special_tokens=False) == [0]


def test_named_templates_are_kept_apart(tmp_path: Path) -> None:
    def template(**metadata: Any) -> Any:
        return write(tmp_path / "m.gguf", **plain(), **metadata).json("tokenizer_config.json").get("chat_template")

    assert template() is None and template(chat_template="{{ a }}") == "{{ a }}"
    both = template(chat_template="{{ a }}", chat_template__tool_use="{{ b }}")
    assert both == [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"ggml__model": None}, "tokenizer.ggml.model is missing"),
    "other kind": ({"ggml__model": "bert"}, "of the kind 'bert'"),
    "pattern": ({"ggml__pre": "mine"}, "'mine'"),
    "no tokens": ({"ggml__tokens": None}, "tokens is missing"),
    "tokens are numbers": ({"ggml__tokens": [1, 2]}, "no list of text"),
    "tokens are one": ({"ggml__tokens": "ab"}, "no list"),
    "few types": ({"ggml__token_type": [1]}, "one number for each of the 7 tokens"),
    "types are text": ({"ggml__token_type": ["a"] * 7}, "one number for each"),
    "no merges": ({"ggml__merges": None}, "merges is missing"),
    "merge of nothing": ({"ggml__merges": ["a c"]}, "cannot be built"),
    "no merge": ({"ggml__merges": ["ab"]}, "cannot be built"),
    "no scores": ({"ggml__model": "llama"}, "scores is missing"),
    "end outside": ({"ggml__eos_token_id": 7}, "there are 7 tokens"),
    "end is text": ({"ggml__eos_token_id": "x"}, "'x'"),
    "flag": ({"ggml__add_bos_token": 3}, "neither true nor false"),
    "template": ({"chat_template": 3}, "chat_template is no text"),
    "embedded": ({"huggingface__json": "{"}, "cannot be built"),
}


@pytest.mark.parametrize("name", WRONG)
def test_metadata_that_cannot_be_used_are_named(tmp_path: Path, name: str) -> None:
    changed, message = WRONG[name]
    text = write(tmp_path / "m.gguf", **plain(**changed))
    with pytest.raises(ModelError) as caught:
        ChatTemplate.load(text)
        Tokenizer.load(text)
    assert message in caught.value.message and caught.value.hint and "\n" not in caught.value.message
