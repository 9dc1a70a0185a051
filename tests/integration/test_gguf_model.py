"""GGUF files through the whole stack: logits beside those of the values that the gguf package reads from the same file.

The other side is this engine on float32 safetensors, which tests/parity holds against transformers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from max.bench import random_model
from max.bench.gguf_export import write_gguf
from max.cache import mef
from max.compiler import Module, Target, native
from max.compiler.artifact import Options, compile_module
from max.compiler.limits import Limits
from max.compiler.panels import Packing
from max.compiler.weights import WeightTable
from max.models.llama import Llama
from max.models.llama_config import Config
from max.models.text_graphs import StepBuilder
from max.runtime.arena import Arena
from max.runtime.checkpoint import Checkpoint
from max.runtime.prepared import layout_of, prepare_into
from max.runtime.request import Generation, Request
from max.runtime.scheduler import Chunk
from max.runtime.session import CompiledModels, InferenceSession
from max.runtime.step_inputs import StepWriter

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not built: no C++ compiler")

SIZE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
}
LIMITS = Limits(max_length=32, max_batch=16, page_tokens=16, num_pages=8, token_buckets=(16,))
PROMPT = [7, 300, 12, 599, 0, 41, 41, 255, 256, 100, 3, 9, 18, 500, 77, 76]
compiled: dict[tuple[Config, WeightTable], CompiledModels] = {}


def logits_of(checkpoint: Checkpoint, packing: Packing) -> np.ndarray:
    """Logits of each token of PROMPT, with matrices in their own encodings, or plain XLA if `packing` is empty."""
    config = Config.from_hf(checkpoint.config)
    table = config.weights(packing, checkpoint.encodings)
    if (config, table) not in compiled:
        buffer = io.BytesIO()
        decoder = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        module = Module("step alone")
        StepBuilder(decoder, config, LIMITS, table).add(module, len(PROMPT), len(PROMPT))
        compile_module(module, Target.parse("cpu"), mef.MefWriter(buffer), Options(weights=table.to_json()))
        compiled[config, table] = CompiledModels(mef.Mef.from_bytes(buffer.getvalue()))
    views = prepare_into(table, checkpoint, Arena(layout_of(table)), threads=2)
    models = InferenceSession().init_all(compiled[config, table], views)
    row = Generation(Request("row", PROMPT), list(PROMPT), row=1, pages=[5, 2])
    inputs = StepWriter(LIMITS).write([Chunk(row, 0, len(PROMPT), samples=True)])
    assert inputs.arrays[-1].shape == (len(PROMPT),)
    return models[inputs.graph](*inputs.arrays[:-1], np.arange(len(PROMPT), dtype=np.int32))[0].to_numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that are large enough for attention to look at some keys more than at others."""
    random_model.SIZES["tests"] = SIZE
    folder = tmp_path_factory.mktemp("gguf") / "model"
    random_model.write_checkpoint(folder, "tests")
    del random_model.SIZES["tests"]
    source = Checkpoint.open(folder)
    tensors = {}
    for name, at in source.tensors.items():
        tensors[name] = np.empty(at.shape, np.float32)
        source.read_into(name, tensors[name])
        tensors[name] *= 4 if len(at.shape) > 1 else 1
    save_file(tensors, folder / "model.safetensors")
    return folder


def dequantized(file: Path, folder: Path) -> Checkpoint:
    """A folder of float32 with the values that the package finds in the file; queries and keys in the order of HF."""
    target = file.with_suffix("")
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZE["num_hidden_layers"])
    stored = {at.name: gguf.dequantize(at.data, at.tensor_type) for at in gguf.GGUFReader(file).tensors}
    tensors = {}
    for name, at in Checkpoint.open(folder).tensors.items():
        to = names.get_name(name, try_suffixes=(".weight",))
        assert to is not None
        values = stored[to].reshape(at.shape)
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                values = values.reshape(heads, 32, 2, 256).swapaxes(1, 2).reshape(at.shape)
        tensors[name] = np.ascontiguousarray(values)
    save_file(tensors, target / "model.safetensors")
    return Checkpoint.open(target)


# Root mean square of the difference, as a share of the logits' own: what rounding activations does.
NEAR = {"f32": 1e-5, "f16": 1e-5, "bf16": 0.01, "q8_0": 0.04, "q6_k": 0.04, "q4_k": 0.04, "q4_0": 0.04}


def share(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())


@pytest.mark.parametrize("type_name", NEAR)
def test_a_file_computes_what_its_values_say(folder: Path, tmp_path: Path, type_name: str) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(folder, file, type_name)
    wanted = logits_of(dequantized(file, folder), "float32")
    checkpoint = Checkpoint.open(file)
    assert share(logits_of(checkpoint, checkpoint.encoding), wanted) <= NEAR[type_name]


def mixed(folder: Path, file: Path, kind_of: Callable[[str], Type]) -> Path:
    """The checkpoint with a type for each tensor of two axes, by its name in GGUF."""
    plain = file.with_name("plain.gguf")
    write_gguf(folder, plain)
    library = native.library()
    assert library is not None
    writer = gguf.GGUFWriter(file, "llama")
    reader = gguf.GGUFReader(plain)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, of = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, of)
    for at in reader.tensors:
        kind = kind_of(at.name) if len(at.shape) > 1 else Type.F32
        values = at.data.astype(np.float32)
        k_quants = {Type.Q4_K: "q4_k", Type.Q6_K: "q6_k"}
        data = library.quantize(values, k_quants[kind]) if kind in k_quants else gguf.quantize(values, kind)  # type: ignore[arg-type]
        writer.add_tensor(at.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def q4_k_m(name: str) -> Type:
    """As llama.cpp mixes Q4_K_M: more bits for the output, and for values and down in some layers."""
    return (
        Type.Q6_K if name == "output.weight" or name in ("blk.0.attn_v.weight", "blk.0.ffn_down.weight") else Type.Q4_K
    )


def of_all_kinds(name: str) -> Type:
    kinds = {
        "attn_q": Type.Q8_0,
        "attn_k": Type.F16,
        "attn_v": Type.BF16,
        "ffn_gate": Type.Q4_0,
        "token_embd": Type.Q6_K,
    }
    return next((kind for part, kind in kinds.items() if part in name), Type.Q4_K)


@pytest.mark.parametrize("kind_of", [q4_k_m, of_all_kinds])
def test_every_matrix_of_a_mixed_file_keeps_its_type(
    folder: Path, tmp_path: Path, kind_of: Callable[[str], Type]
) -> None:
    file = mixed(folder, tmp_path / "m.gguf", kind_of)
    wanted = logits_of(dequantized(file, folder), "float32")
    checkpoint = Checkpoint.open(file)
    assert checkpoint.encoding == "q4_k"
    table = Config.from_hf(checkpoint.config).weights("q4_k", checkpoint.encodings)
    kinds = {weight.name: weight.packed for weight in table.weights}
    if kind_of is q4_k_m:
        assert kinds["embed"] == "q4_k"
        assert (kinds["blocks.0.qkv.0"], kinds["blocks.0.qkv.1"], kinds["blocks.1.qkv"]) == ("q4_k", "q6_k", "q4_k")
        assert (kinds["blocks.0.down"], kinds["blocks.1.down"], kinds["head"]) == ("q6_k", "q4_k", "q6_k")
    else:
        assert kinds["embed"] == "q6_k"
        assert [kinds[f"blocks.0.qkv.{at}"] for at in range(3)] == ["q8_0", "float32", "bfloat16"]
        assert (kinds["blocks.1.gate_up.0"], kinds["blocks.1.gate_up.1"]) == ("q4_0", "q4_k")
    assert share(logits_of(checkpoint, "q4_k"), wanted) <= 0.04


def test_a_tied_file_without_kernels_is_dequantized(folder: Path, tmp_path: Path) -> None:
    tied = tmp_path / "tied"
    tied.mkdir()
    for file in folder.iterdir():
        (tied / file.name).symlink_to(file)
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").unlink()
    (tied / "config.json").write_text(json.dumps(raw))
    write_gguf(tied, tmp_path / "m.gguf", "q4_0")
    checkpoint = Checkpoint.open(tmp_path / "m.gguf")
    wanted = logits_of(checkpoint, "q4_0")
    assert share(logits_of(checkpoint, ""), wanted) <= 0.04
