"""The shipped files of the built-in model: complete, small, and read alike by the libraries that others use."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from max.models.builtin import FOLDER
from max.models.builtin.card import render_card
from max.models.builtin.evaluate import WORD, Model, sample
from max.models.builtin.tokenizer import SPECIAL
from max.models.llama_config import Config

TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_the_weights_are_small() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000
    assert read("evaluation.json")["parameters"] <= 6_000_000


def test_the_tensors_are_those_of_the_config() -> None:
    table = Config.from_hf(read("config.json")).weights()
    expected = {name: shape for weight in table.weights for name, shape in weight.source_shapes()}
    with safe_open(FOLDER / "model.safetensors", framework="numpy") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        assert {name: tuple(tensor.get_shape()) for name, tensor in found.items()} == expected
        assert {tensor.get_dtype() for tensor in found.values()} == {"BF16"}


def test_config_and_tokenizer_agree() -> None:
    config, generation = read("config.json"), GenerationConfig.from_pretrained(FOLDER)
    assert TOKENIZER.get_vocab_size() == config["vocab_size"]
    assert TOKENIZER.id_to_token(generation.eos_token_id) == "<|end|>"
    assert TOKENIZER.id_to_token(config["bos_token_id"]) == "<|bos|>"
    assert config["eos_token_id"] == generation.eos_token_id
    assert generation.do_sample and 0 < generation.temperature < 1 and generation.top_k and generation.top_p
    assert read("tokenizer_config.json")["model_max_length"] == config["max_position_embeddings"]


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_the_template_marks_roles_and_ends_turns() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    conversation = [
        {"role": "system", "content": "You are a dictionary."},
        {"role": "user", "content": " robot "},
        {"role": "assistant", "content": "a machine"},
        {"role": "user", "content": "cat"},
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|> You are a dictionary.<|end|><|user|> robot<|end|><|assistant|>a machine<|end|>"
        "<|user|> cat<|end|><|assistant|>"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [i for i in ids if i < len(SPECIAL)] == [TOKENIZER.token_to_id(m) for m in _marks(text)]


def _marks(text: str) -> list[str]:
    return [f"<|{part.split('|>')[0]}|>" for part in text.split("<|")[1:]]


def test_an_unknown_role_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_text_without_a_template_starts_with_bos_once() -> None:
    assert AutoTokenizer.from_pretrained(FOLDER)("robot:").input_ids.count(TOKENIZER.token_to_id("<|bos|>")) == 1


def test_a_question_is_answered_with_words_and_an_end() -> None:
    model = Model.load(FOLDER)
    first, second = (sample(model, ["robot"], seed=7)[0] for _ in range(2))
    assert first == second
    assert first[-1] == model.end and WORD.search(TOKENIZER.decode(first))


def test_the_card_shows_the_measured_figures() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card == render_card(FOLDER)
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in card


def test_the_measured_figures_pass_the_bar() -> None:
    figures = read("evaluation.json")
    assert figures["samples"] == 200
    assert figures["known_words_percent"] >= 95
    assert figures["answers_that_loop"] == figures["answers_without_end"] == figures["answers_empty"] == 0
