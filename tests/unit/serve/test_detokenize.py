"""The joined pieces of a stream are what the library decodes at once, for every kind of decoder and any ids."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from max.serve.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and does not stop.",
    "Straße, naïve café — “quoted”… 北京 東京 서울 Привет мир",
    "def f(x):\n    return x  # \t tabs\n\n",
    "👩‍🔬 emoji 🇩🇪 ﷽ ê combining",
]
SPECIAL = ["<s>", "</s>"]


def trained_bpe(corpus: list[str], vocab_size: int = 400) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens(["added token with spaces", "é"])
    return backend


def sentencepiece_bpe(decoder: decoders.Decoder) -> Backend:
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *SPECIAL, *bytes_], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    # The trainer takes the byte tokens as special ones; in checkpoints they are plain vocabulary.
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in bytes_]
    backend = Backend.from_str(json.dumps(raw))
    backend.decoder = decoder
    return backend


def llama_2() -> Backend:
    backend = sentencepiece_bpe(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    )
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def gemma() -> Backend:
    return sentencepiece_bpe(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def metaspace() -> Backend:
    return sentencepiece_bpe(decoders.Metaspace())


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_suffix() -> Backend:
    backend = Backend(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIAL], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def no_decoder() -> Backend:
    backend = trained_bpe(CORPUS)
    backend.decoder = None
    return backend


def rewriting() -> Backend:
    return sentencepiece_bpe(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace(Regex("e +"), "E")])
    )


FAMILIES = [
    lambda: trained_bpe(CORPUS),
    llama_2,
    gemma,
    metaspace,
    unigram,
    word_piece,
    word_suffix,
    no_decoder,
    rewriting,
]
NAMES = ["byte_level", *(family.__name__ for family in FAMILIES[1:])]


@pytest.fixture(scope="module", params=FAMILIES, ids=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.param())


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@settings(max_examples=settings().max_examples * 4 // 5)
@given(data=st.data(), skip=st.booleans())
def test_pieces_join_to_the_one_shot_text_of_random_ids(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=24))
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=settings().max_examples * 3 // 5)
@given(text=st.text(max_size=40) | st.sampled_from(CORPUS))
def test_pieces_join_to_the_one_shot_text_of_encoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=settings().max_examples // 8)
@given(corpus=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=6), data=st.data())
def test_pieces_join_for_byte_level_tokenizers_of_any_corpus(corpus: list[str], data: st.DataObject) -> None:
    tokenizer = Tokenizer(trained_bpe(corpus, vocab_size=300))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "family", [lambda: trained_bpe(CORPUS[:1]), llama_2, gemma], ids=["byte_level", "llama_2", "gemma"]
)
def test_a_character_of_several_tokens_arrives_whole(family) -> None:
    tokenizer = Tokenizer(family())
    ids = tokenizer.encode("a 𓀀 b", add_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    assert sum(len("𓀀".encode()) == 4 and "𓀀" in piece for piece in pieces) == 1
    assert not any("�" in piece for piece in pieces)
    assert "".join(pieces).strip() == "a 𓀀 b"


@pytest.mark.parametrize("family", FAMILIES[:8], ids=NAMES[:8])
def test_text_arrives_before_the_end(family: Callable[[], Backend]) -> None:
    tokenizer = Tokenizer(family())
    ids = tokenizer.encode("The quick brown fox", add_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    assert pieces[-1] == ""
    assert sum(bool(piece) for piece in pieces) > len(ids) // 2


def test_text_of_plain_tokens_is_never_a_token_late() -> None:
    tokenizer = Tokenizer(llama_2())
    ids = tokenizer.encode("The quick brown fox", add_special_tokens=False)
    stream = tokenizer.stream()
    shown = ""
    for position, token_id in enumerate(ids):
        shown += stream.push(token_id)
        assert shown == tokenizer.decode(ids[: position + 1])


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    tokenizer = Tokenizer(trained_bpe(CORPUS[:1]))
    ids = tokenizer.encode("𓀀", add_special_tokens=False)[:-1]
    assert streamed(tokenizer, ids)[-1] == "�" == tokenizer.decode(ids)


def test_a_long_run_without_valid_text_costs_constant_work_per_token() -> None:
    tokenizer = Tokenizer(trained_bpe(CORPUS[:1]))
    bad = next(token_id for token_id in range(tokenizer.vocab_size) if tokenizer.decode([token_id] * 2) == "��")
    assert "".join(streamed(tokenizer, [bad] * 20_000)).startswith("�" * 19_000)
