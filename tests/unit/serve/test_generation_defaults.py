"""The defaults that a checkpoint states, the tokens that end its answers, and values that cannot be meant."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from max import ModelError
from max.serve.generation_defaults import GenerationDefaults
from max.serve.text_files import FolderText
from max.serve.tokenizer import Tokenizer


def load(folder: Path, eos_token: str | None = None, **files: object) -> GenerationDefaults:
    """Writes `files` (name without .json -> content) and reads the defaults; token ids: a 0, b 1."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    special = {"eos_token": eos_token} if eos_token else {}
    return GenerationDefaults.load(FolderText(folder), Tokenizer(Backend(BPE({"a": 0, "b": 1}, [])), special))


def test_a_checkpoint_that_says_nothing(tmp_path: Path) -> None:
    assert load(tmp_path) == GenerationDefaults()


def test_every_default(tmp_path: Path) -> None:
    stated = {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 1,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "do_sample": True,
        "max_new_tokens": 512,
        "transformers_version": "4.51.0",
        "pad_token_id": 0,
    }
    assert load(tmp_path, generation_config=stated) == GenerationDefaults(
        frozenset(), 0.7, 20, 1.0, 0.05, 1.05, True, 512
    )


def test_null_says_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, generation_config={"temperature": None, "eos_token_id": None}) == GenerationDefaults()


def test_the_ending_tokens_of_all_files_count(tmp_path: Path) -> None:
    defaults = load(tmp_path, "b", generation_config={"eos_token_id": [7, 8]}, config={"eos_token_id": 9})
    assert defaults.stop_token_ids == {1, 7, 8, 9}
    assert load(tmp_path, "absent").stop_token_ids == {7, 8, 9}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 1.5),
        ("top_k", -1),
        ("top_p", 1.1),
        ("min_p", [0.1]),
        ("repetition_penalty", 0),
        ("do_sample", 1),
        ("max_new_tokens", 0),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, -1]),
        ("eos_token_id", True),
        ("eos_token_id", {"id": 1}),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json: {key} is ") as caught:
        load(tmp_path, generation_config={key: value})
    assert "It has to be" in caught.value.hint


def test_config_json_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"/config\.json: eos_token_id is 'x'"):
        load(tmp_path, config={"eos_token_id": "x"})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        load(tmp_path)
