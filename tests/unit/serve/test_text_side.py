"""From a folder's text files to prompts, sampling parameters and stop rules: what is asked for wins over defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from max import RequestError
from max.runtime.config import SamplingConfig
from max.serve.text_side import TextSide, check_prompt

WORDS = ["<s>", "</s>", "user", "hello", "world"]


@pytest.fixture
def make(tmp_path: Path):
    """Writes a folder with a tokenizer of whole words and these files, and loads it."""

    def load(
        generation: dict[str, Any] | None = None, template: str | None = None, given: str | None = None
    ) -> TextSide:
        backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<s>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
        backend.save(str(tmp_path / "tokenizer.json"))
        config = {"eos_token": "</s>", **({"chat_template": template} if template else {})}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "generation_config.json").write_text(json.dumps(generation or {}))
        return TextSide.load(tmp_path, given)

    return load


def test_a_prompt_is_text_where_there_is_no_template(make) -> None:
    assert make().prompt_ids("hello world", apply_chat_template=None) == [3, 4]
    with pytest.raises(RequestError, match="no chat template"):
        make().prompt_ids("hello", apply_chat_template=True)


def test_a_prompt_is_a_message_where_there_is_one(make, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.role + ' ' + message.content }}{% endfor %}"
    text = make(template=template)
    assert text.prompt_ids("hello", apply_chat_template=None) == [2, 3]
    assert text.prompt_ids("hello", apply_chat_template=False) == [3]
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }} world")
    for given in ("{{ messages[0].content }} world", str(tmp_path / "other.jinja")):
        assert make(template=template, given=given).prompt_ids("hello", apply_chat_template=True) == [3, 4]


def test_what_is_asked_for_wins_over_the_checkpoint_and_that_over_the_rest(make) -> None:
    text = make({"temperature": 0.5, "top_p": 0.9, "top_k": 0})
    params = text.sampling(SamplingConfig(top_p=0.8, seed=3))
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.8, 0, 0.0, 3)
    plain = make().sampling(SamplingConfig())
    assert (plain.temperature, plain.top_p, plain.top_k, plain.repetition_penalty) == (1.0, 1.0, 255, 1.0)


def test_a_checkpoint_that_does_not_sample_is_greedy_unless_a_temperature_is_given(make) -> None:
    text = make({"do_sample": False, "temperature": 0.7})
    assert text.sampling(SamplingConfig()).is_greedy
    assert text.sampling(SamplingConfig(temperature=0.4)).temperature == 0.4


def test_a_seed_that_is_not_given_is_drawn(make) -> None:
    text = make()
    assert len({text.sampling(SamplingConfig()).seed for _ in range(8)}) == 8


@pytest.mark.parametrize(
    ("default", "given", "room", "wanted"),
    [(None, None, 9, 9), (4, None, 9, 4), (4, 6, 9, 6), (4, -1, 9, 9), (None, 6, 5, 5), (40, None, 5, 5)],
)
def test_an_answer_ends_with_the_context_at_the_latest(make, default, given, room: int, wanted: int) -> None:
    text = make({} if default is None else {"max_new_tokens": default})
    assert text.stop_rules(SamplingConfig(max_new_tokens=given), room, len(WORDS)).max_new_tokens == wanted


def test_only_tokens_that_the_model_has_can_end_an_answer(make) -> None:
    text = make({"eos_token_id": [3, 99]})
    rules = text.stop_rules(SamplingConfig(stop_token_ids=(2,)), 9, len(WORDS))
    assert rules.ending_token_ids == {1, 2, 3}
    assert text.stop_rules(SamplingConfig(stop_token_ids=(2,), ignore_eos=True), 9, 5).ending_token_ids == {2}
    with pytest.raises(RequestError, match="stop_token_ids holds 5") as refused:
        text.stop_rules(SamplingConfig(stop_token_ids=(5,)), 9, len(WORDS))
    assert refused.value.hint == "Its token ids go from 0 to 4."


def test_a_prompt_leaves_room_and_is_of_the_vocabulary() -> None:
    assert check_prompt([1, 2, 3], 8, 4) == 5
    for prompt, length, vocabulary, message in (
        ([], 8, 4, "no tokens"),
        ([1, 2, 3], 3, 4, "has 3 tokens, and the context has room for 3"),
        ([1, 4], 8, 4, "the tokenizer gives 4"),
    ):
        with pytest.raises(RequestError, match=message):
            check_prompt(prompt, length, vocabulary)


def test_the_files_are_those_that_there_are(make, tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert make().files == [tmp_path / name for name in names]
