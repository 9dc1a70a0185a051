"""No text has fewer tokens than is said of it, whatever the tokenizer; and where text is dropped, nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from max.serve.token_bound import most_bytes_per_token

CORPUS = ["hello hello tokens      of\n\n text", "한국어 日本語 ᾂ été", "1234567 " * 3]


def byte_level(normalizer: Any = None, split: Any = None) -> Backend:
    backend = Backend(models.BPE())
    backend.normalizer = normalizer
    steps = [split] if split else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, special_tokens=["<|end|>"])
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece() -> Backend:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {token: 256 + at for at, token in enumerate(["<unk>", "▁", "a", "b", "▁a", "▁ab"])}
    merges = [("▁", "a"), ("▁a", "b")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


BOUNDED = {
    "gpt-2": byte_level(),
    "qwen2": byte_level(normalizers.NFC(), pre_tokenizers.Split(Regex(r"\d"), "isolated")),
    "llama-2": sentencepiece(),
}
TEXTS = st.one_of(
    st.text(), st.text("ab \n"), st.text("ᄀ각각"), st.text("ᾂα̂e\u0301"), st.sampled_from(["<|end|>", "hello"])
)


@pytest.mark.parametrize("name", BOUNDED)
@given(parts=st.lists(TEXTS), times=st.integers(1, 40))
def test_a_text_has_no_fewer_tokens(name: str, parts: list[str], times: int) -> None:
    text = "".join(parts) * times
    most = most_bytes_per_token(BOUNDED[name])
    assert most is not None
    assert len(BOUNDED[name].encode(text, add_special_tokens=False).ids) >= len(text.encode()) // most


def test_a_tokenizer_that_drops_text_is_not_bounded() -> None:
    stripping = byte_level()
    stripping.add_special_tokens([AddedToken("<|x|>", rstrip=True, special=True)])
    incomplete = Backend(models.BPE({"a": 0}, []))
    incomplete.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    removing = byte_level(split=pre_tokenizers.Split(" ", "removed"))
    words = Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    stripped = byte_level(normalizers.Strip())
    for backend in (stripping, incomplete, removing, words, stripped):
        assert most_bytes_per_token(backend) is None
