"""GGUF files of random checkpoints, read back by the gguf package."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from max.bench import random_model
from max.bench.gguf_export import TYPES, main, write_gguf

SIZE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}


STEPS = {"f32": 1e30, "f16": 2**11, "bf16": 2**8, "q8_0": 127, "q6_k": 30, "q4_k": 7, "q4_0": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random_model.SIZES["tests"] = SIZE
    folder = tmp_path_factory.mktemp("export") / "model"
    random_model.write_checkpoint(folder, "tests")
    del random_model.SIZES["tests"]
    return folder


@pytest.mark.parametrize("type_name", TYPES)
def test_the_file_holds_the_weights_in_the_type_asked_for(folder: Path, tmp_path: Path, type_name: str) -> None:
    main([str(folder), str(tmp_path / "m.gguf"), "--type", type_name])
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    source = load_file(folder / "model.safetensors")
    assert len(tensors) == len(source)
    embed = tensors["token_embd.weight"]
    assert (
        embed.tensor_type == TYPES[type_name]
        and tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    )
    wanted = source["model.embed_tokens.weight"]
    step = np.abs(wanted).max() / STEPS[type_name]
    assert np.abs(gguf.dequantize(embed.data, embed.tensor_type) - wanted).max() <= step


def test_queries_are_interleaved_and_metadata_is_that_of_the_config(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    source = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(stored[:4], source[[0, 32, 1, 33]])
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["llama.attention.head_count_kv"] == 2 and found["llama.rope.dimension_count"] == 64
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert found["tokenizer.ggml.tokens"] == sorted(vocab, key=vocab.__getitem__)
    assert found["tokenizer.ggml.eos_token_id"] == vocab["<|im_end|>"]
