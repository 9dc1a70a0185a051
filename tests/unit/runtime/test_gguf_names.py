"""A GGUF file opens as the checkpoint that it was made from: settings, names, and every value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from max import ModelError, UnsupportedArchitecture
from max.bench import random_model
from max.bench.gguf_export import TYPES, write_gguf
from max.models.llama_config import Config
from max.models.rope import inverse_frequencies
from max.runtime.checkpoint import Checkpoint

SIZE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}


ENCODINGS = {"f32": "float32", "bf16": "bfloat16", "q8_0": "q8_0", "q6_k": "q6_k", "q4_k": "q4_k", "q4_0": "q4_0"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random_model.SIZES["tests"] = SIZE
    folder = tmp_path_factory.mktemp("names") / "model"
    random_model.write_checkpoint(folder, "tests")
    del random_model.SIZES["tests"]
    return folder


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    out = np.empty(checkpoint.tensors[name].shape, np.float32)
    checkpoint.read_into(name, out)
    return out


@pytest.mark.parametrize("type_name", TYPES)
def test_the_values_are_those_of_the_package(folder: Path, tmp_path: Path, type_name: str) -> None:
    write_gguf(folder, tmp_path / "m.gguf", type_name)
    source, found = Checkpoint.open(folder), Checkpoint.open(tmp_path / "m.gguf")
    assert found.tensors.keys() == source.tensors.keys()
    assert (
        set(found.encodings.values()) == {ENCODINGS.get(type_name, "float32")} and found.encoding in ENCODINGS.values()
    )
    stored = {at.name: at for at in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    values = {name: gguf.dequantize(at.data, at.tensor_type) for name, at in stored.items()}
    same = {"model.norm.weight": "output_norm", "model.embed_tokens.weight": "token_embd", "lm_head.weight": "output"}
    for layer in range(2):
        same |= {f"model.layers.{layer}.{to}.weight": f"blk.{layer}.{name}" for to, name in PARTS.items()}
    assert same.keys() == source.tensors.keys()
    for name, stored_as in same.items():
        wanted = values[f"{stored_as}.weight"]
        if heads := {"attn_q": 4, "attn_k": 2}.get(stored_as.split(".")[-1]):
            wanted = wanted.reshape(heads, 32, 2, 256).swapaxes(1, 2).reshape(-1, 256)
        np.testing.assert_array_equal(read(found, name), wanted, name)
        if type_name == "f32":
            np.testing.assert_array_equal(read(found, name), read(source, name), name)


def test_parts_of_a_tensor_may_cut_through_heads(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "m.gguf", "q8_0")
    found, name = Checkpoint.open(tmp_path / "m.gguf"), "model.layers.1.self_attn.q_proj.weight"
    whole = read(found, name)
    for first, last in ((0, 5), (3, 140), (63, 65), (255, 256)):
        part = np.empty((last - first, 256), np.float32)
        found.read_into(name, part, rows=(first, last))
        np.testing.assert_array_equal(part, whole[first:last])
        turned = np.empty((256, last - first), np.float32)
        found.read_into(name, turned, True, (first, last))
        np.testing.assert_array_equal(turned, whole[first:last].T)
        blocks = np.empty((last - first, 256 // 32 * 34), np.uint8)
        found.read_stored_into(name, blocks, (first, last))
        np.testing.assert_array_equal(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0), whole[first:last])


def changed(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of the checkpoint with other settings, as GGUF."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "config.json").unlink()
    raw = json.loads((folder / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(raw))
    write_gguf(copy, tmp_path / "m.gguf")
    return copy


SCALINGS = [
    {},
    {"rope_theta": 500000.0, "max_position_embeddings": 8192},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}},
    {"tie_word_embeddings": True},
]


@pytest.mark.parametrize("config", SCALINGS)
def test_the_config_is_that_of_config_json(folder: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    wanted = Config.from_hf(Checkpoint.open(changed(folder, tmp_path, **config)).config)
    found = Checkpoint.open(tmp_path / "m.gguf")
    assert Config.from_hf(found.config) == wanted
    found.check(wanted.weights())


def test_llama3_scaling_comes_as_a_tensor(folder: Path, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    wanted = Config.from_hf(Checkpoint.open(changed(folder, tmp_path, rope_scaling=scaling)).config)
    found = Config.from_hf(Checkpoint.open(tmp_path / "m.gguf").config)
    np.testing.assert_allclose(inverse_frequencies(found.rope), inverse_frequencies(wanted.rope), rtol=1e-6)
    assert len(set(found.rope.factors)) > 2


def test_rows_are_left_alone_where_they_are_in_order(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "m.gguf")
    normal, neox = Checkpoint.open(tmp_path / "m.gguf"), Checkpoint.open(tmp_path / "m.gguf", rope_order="neox")
    name = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(read(neox, name)[[0, 2, 4]], read(normal, name)[:3])
    assert normal.identity()["sha256"] != neox.identity()["sha256"]


def written(path: Path, drop: str = "", **values: Any) -> Path:
    """A GGUF file of settings alone, of which one may be left out and others may be given."""
    writer = gguf.GGUFWriter(path, values.pop("architecture", "llama"))
    settings: dict[str, Any] = {
        "embedding_length": 64,
        "attention.head_count": 4,
        "feed_forward_length": 96,
        "block_count": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "context_length": 128,
    }
    for name, value in (settings | values).items():
        if name == drop:
            continue
        key = name if "." in name and not name.startswith(("attention", "rope")) else f"llama.{name}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        (add.get(type(value)) or writer.add_array)(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((640, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WRONG = [
    ({"drop": "embedding_length"}, "embedding_length is missing"),
    ({"drop": "attention.layer_norm_rms_epsilon"}, "layer_norm_rms_epsilon is missing"),
    ({"attention.head_count": "many"}, "'many'"),
    ({"attention.head_count": 0}, "positive integer"),
    ({"attention.head_count": [4, 4]}, "positive integer"),
    ({"feed_forward_length": True}, "positive integer"),
    ({"attention.value_length": 8}, "heads of 16 dimensions"),
    ({"rope.dimension_count": 8}, "rotated whole"),
    ({"rope.freq_base": -1.0}, "positive number"),
    ({"rope.scaling.type": "longrope"}, "longrope"),
    ({"rope.scaling.type": "linear"}, "rope.scaling.factor is missing"),
    ({"rope.scaling.type": 3}, "text"),
    ({"split.count": 3}, "one of 3 parts"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_settings_that_cannot_be_used_are_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(written(tmp_path / "m.gguf", **values))
    assert message in caught.value.message and caught.value.hint


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="qwen2"):
        Checkpoint.open(written(tmp_path / "m.gguf", architecture="qwen2"))


# --- which file


def test_a_folder_may_hold_one_gguf_file_or_name_one(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "a.gguf")
    assert Checkpoint.open(tmp_path).files == [tmp_path / "a.gguf"]
    write_gguf(folder, tmp_path / "b.gguf", "q8_0")
    with pytest.raises(ModelError, match=r"several GGUF files: a\.gguf, b\.gguf"):
        Checkpoint.open(tmp_path)
    assert Checkpoint.open(tmp_path, Path("b.gguf")).encoding == "q8_0"
    both = Checkpoint.open(folder, tmp_path / "b.gguf")
    assert both.source == "config.json" and both.encoding == "q8_0"
    assert {"config.json", str(tmp_path / "b.gguf")} < {file["name"] for file in both.identity()["files"]}
    for model, weights in ((tmp_path / "a.gguf", tmp_path / "b.gguf"), (folder, Path("absent.gguf"))):
        with pytest.raises(ModelError):
            Checkpoint.open(model, weights)
    with pytest.raises(ModelError, match="there is no file"):
        Checkpoint.open(tmp_path / "absent.gguf")
