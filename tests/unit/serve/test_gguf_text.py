"""The text side of a GGUF file beside the tokenizer.json that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from max.bench import random_model
from max.bench.gguf_export import write_gguf
from max.serve.text_side import TextSide

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1000,
}
BUILT_IN = Path(__file__).parents[3] / "models" / "builtin"


@pytest.fixture(scope="module", params=["random", "built-in"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextSide, TextSide]:
    """The text sides of a folder and of the GGUF file made from it."""
    work = tmp_path_factory.mktemp("text")
    folder = BUILT_IN
    if request.param == "random":
        random_model.SIZES["tests"] = SIZE
        folder = work / "model"
        random_model.write_checkpoint(folder, "tests")
        del random_model.SIZES["tests"]
    write_gguf(folder, work / "m.gguf", "f16")
    return TextSide.load(folder), TextSide.load(work / "m.gguf")


@settings(max_examples=500, deadline=None)
@given(text=st.text() | st.text("abcdefgh 0123.,'<|>\n") | st.sampled_from(["<|end|> a", "<|im_end|>x<|im_start|>"]))
def test_text_becomes_the_same_tokens(pair: tuple[TextSide, TextSide], text: str) -> None:
    ours, theirs = pair[1].tokenizer, pair[0].tokenizer
    for special in (True, False):
        ids = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special) == ids
        assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)


def test_templates_stop_tokens_and_special_tokens_are_the_same(pair: tuple[TextSide, TextSide]) -> None:
    folder, file = pair
    assert file.prompt_ids("hello", apply_chat_template=None) == folder.prompt_ids("hello", apply_chat_template=None)
    assert file.defaults.stop_token_ids == folder.defaults.stop_token_ids
    assert (file.tokenizer.bos_id, file.tokenizer.eos_id) == (folder.tokenizer.bos_id, folder.tokenizer.eos_id)
    assert file.tokenizer.special_ids == folder.tokenizer.special_ids
    assert file.files == []
