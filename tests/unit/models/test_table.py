"""The table of architectures: what it finds, what it refuses, and that its modules are there."""

from importlib import import_module
from importlib.util import find_spec

import pytest

from max import UnsupportedArchitecture
from max.models.table import ARCHITECTURES, find, load_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=str)
def test_every_row_names_modules_that_are_there(row) -> None:
    assert row is find(row.name)
    assert import_module(row.config_module, "max.models").Config.from_hf
    assert find_spec(row.model_module, "max.models")
    assert row.encodings and row.tasks and row.cache_strategies and row.example_repo_ids


def test_an_unknown_name_gets_the_near_ones() -> None:
    with pytest.raises(UnsupportedArchitecture) as caught:
        find("LlamaForCausalML")
    assert "LlamaForCausalML" in caught.value.message
    assert "LlamaForCausalLM" in caught.value.hint and "max list" in caught.value.hint
    with pytest.raises(UnsupportedArchitecture) as caught:
        find("")
    assert "Near" not in caught.value.hint


def test_a_config_is_parsed_by_its_architecture() -> None:
    config = load_config(find("LlamaForCausalLM"), LLAMA)
    assert (config.vocab_size, config.max_position) == (32, 64)
    assert {weight.name for weight in config.weights().weights} >= {"embed", "blocks.0.qkv", "norm", "head"}
