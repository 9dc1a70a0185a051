"""The layers of a decoding step in one call: the bits of a step that calls their operations one by one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from max.bench import random_model
from max.cache import mef
from max.compiler import Module, Target, xla
from max.compiler.artifact import Options, compile_module
from max.compiler.limits import Limits
from max.compiler.native import library
from max.compiler.panels import Packing
from max.compiler.weights import WeightTable
from max.models import llama
from max.models.kernel_layers import REGION
from max.models.llama_config import Config
from max.models.text_graphs import StepBuilder
from max.runtime.arena import Arena
from max.runtime.checkpoint import Checkpoint
from max.runtime.model import InputError
from max.runtime.prepared import layout_of, prepare_into
from max.runtime.session import CompiledModels, InferenceSession

if library() is None:
    pytest.skip("the package was installed without a C++ compiler", allow_module_level=True)

TOKENS, PAGE, LAYERS = 3, 16, 3
SIZE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
LIMITS = Limits(64, TOKENS, PAGE, 13, (TOKENS,), "bfloat16")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    random_model.SIZES["tests"] = SIZE
    folder: Path = tmp_path_factory.mktemp("layers") / "model"
    random_model.write_checkpoint(folder, "tests")
    del random_model.SIZES["tests"]
    return Checkpoint.open(folder)


def compiled(config: Config, table: WeightTable) -> CompiledModels:
    decoder = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    module, buffer = Module("step"), io.BytesIO()
    StepBuilder(decoder, config, LIMITS, table).add(module, TOKENS, TOKENS)
    compile_module(module, Target.parse("cpu"), mef.MefWriter(buffer), Options(weights=table.to_json()))
    return CompiledModels(mef.Mef.from_bytes(buffer.getvalue()))


def two_steps(found: CompiledModels, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The logits of two steps of two sequences and padding, whose second one reads what the first one has written."""
    step = InferenceSession().init_all(found, weights)[f"step_t{TOKENS}_r{TOKENS}"]
    table = np.zeros((TOKENS, LIMITS.max_pages), np.int32)
    table[0, :2], table[2, :1] = (4, 7), (5,)
    rows, logits = np.array([0, 2, -1], np.int32), []
    for at in range(2):
        positions = np.array([at, at, 0], np.int32)
        given = {
            "tokens": np.array([7 + at, 290, 0], np.int32),
            "token_src": np.full(TOKENS, -1, np.int32),
            "prev_ids": np.zeros(TOKENS, np.int32),
            "positions": positions,
            "rows": rows,
            "slots": np.where(rows < 0, 0, table[rows, 0] * PAGE + positions).astype(np.int32),
            "page_table": table,
            "lengths": np.array([at + 1, 0, at + 1], np.int32),
            "logit_rows": np.array([1, 0, 2], np.int32),
        }
        found_logits, ids = step(*(given[each.name] for each in step.input_metadata))
        logits.append(found_logits.to_numpy()[:2].copy())
        np.testing.assert_array_equal(ids.to_numpy()[:2], np.argmax(logits[-1], axis=1))
    return logits


@pytest.mark.quick(packing=["bfloat16", "q8_0"])
@pytest.mark.parametrize("packing", ["float32", "bfloat16", "q8_0", "q4_k"])
def test_logits_have_the_bits_of_operations_one_by_one(
    checkpoint: Checkpoint, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.from_hf(checkpoint.config)
    table = config.weights(packing)
    weights = prepare_into(table, checkpoint, Arena(layout_of(table)), threads=2)
    together = compiled(config, table)
    assert "max_decoder_layers_v1" in together.artifact.json(mef.CUSTOM_CALLS)
    found = two_steps(together, weights)
    monkeypatch.setattr(llama.Block, "layer_gate", None)
    apart = compiled(config, table)
    assert "max_decoder_layers_v1" not in apart.artifact.json(mef.CUSTOM_CALLS)
    wanted = two_steps(apart, weights)
    assert np.std(wanted[0]) > 0.1 and (wanted[0] != wanted[1]).any()
    np.testing.assert_array_equal(found, wanted)


def test_layers_are_one_argument_that_shares_the_arena(checkpoint: Checkpoint) -> None:
    """Weights that do not lie as the arena lays them out are copied, and compute the same."""
    config = Config.from_hf(checkpoint.config)
    table = config.weights("q8_0")
    arena = Arena(layout_of(table))
    weights = prepare_into(table, checkpoint, arena, threads=2)
    graphs = compiled(config, table)
    (graph,) = graphs.graphs.values()
    assert [each.name for each in graph.weights] == ["embed", "norm", "head", REGION]
    model = InferenceSession().init_all(graphs, weights)[graph.name]
    shared = [xla.address(buffer) - arena.memory.ctypes.data for buffer in model._weights]
    assert shared == [slot.offset for name in ("embed", "norm", "head", "blocks.0.input_norm")
                      for slot in arena.slots if slot.name == name]  # fmt: skip
    apart = {name: weights[name].copy() for name in sorted(weights)}
    np.testing.assert_array_equal(two_steps(graphs, weights), two_steps(graphs, apart))


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_layers_with_biases_are_left_to_their_operations(checkpoint: Checkpoint, bias: str) -> None:
    config = Config.from_hf({**checkpoint.config, bias: True})
    artifact = compiled(config, config.weights("q8_0")).artifact
    assert "max_decoder_layers_v1" not in artifact.json(mef.CUSTOM_CALLS)
    assert "max_attention_v3" in artifact.json(mef.CUSTOM_CALLS)


def test_the_region_of_a_graph_fits_its_weights(checkpoint: Checkpoint) -> None:
    """A region says where its weights begin, each behind the end of the one before."""
    table = Config.from_hf(checkpoint.config).weights("q4_0")
    region = table.region("blocks.")
    slots = {slot.name: slot for slot in Arena(layout_of(table)).slots}
    first = slots["blocks.0.input_norm"].offset
    assert {name: slots[name].offset - first for name in region.offsets} == dict(region.offsets)
    assert region.nbytes == slots[f"blocks.{LAYERS - 1}.down"].stop - first


def test_a_part_of_the_region_that_is_missing_or_of_another_type_is_named(checkpoint: Checkpoint) -> None:
    config = Config.from_hf(checkpoint.config)
    table = config.weights("q8_0")
    weights = prepare_into(table, checkpoint, Arena(layout_of(table)), threads=2)
    graphs = compiled(config, table)
    with pytest.raises(InputError, match=r"blocks\.1\.o"):
        two_steps(graphs, {name: array for name, array in weights.items() if name != "blocks.1.o"})
    with pytest.raises(InputError, match=r"blocks\.1\.o"):
        two_steps(graphs, {**weights, "blocks.1.o": weights["blocks.1.o"][:-1]})
