"""Weights for devices: in the checkpoint's orientation, as float32 or bfloat16."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from max.compiler.weights import Element, Weight, WeightTable
from max.runtime import prepared
from max.runtime.arena import Arena
from max.runtime.checkpoint import Checkpoint

LAYERS = 3
KINDS = (
    Weight("norm", (24,), ("norm",)),
    Weight("qkv", (24, 40), ("q", "k", "v"), (20, 10, 10), transposed=True),
    Weight("bias", (40,), ("qb", "kb", "vb"), (20, 10, 10)),
    Weight("o", (20, 24), ("o",), transposed=True),
)


def of_layer(weight: Weight, layer: int) -> Weight:
    sources = tuple(f"layers.{layer}.{source}" for source in weight.sources)
    return Weight(f"blocks.{layer}.{weight.name}", weight.shape, sources, weight.widths, weight.transposed)


TABLE = WeightTable(
    (
        Weight("embed", (50, 24), ("embed",)),
        *(of_layer(weight, layer) for layer in range(LAYERS) for weight in KINDS),
        Weight("head", (24, 50), ("head",), transposed=True),
    )
)


def save(folder: Path, dtype: type) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    shapes = dict(source for weight in TABLE.weights for source in weight.source_shapes())
    rng = np.random.default_rng(0)
    save_file(
        {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    return Checkpoint.open(folder), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("group_bytes", [1, 3000, 32 << 20])
def test_matrices_are_as_the_checkpoint_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, element: Element, stored: type, group_bytes: int
) -> None:
    monkeypatch.setattr(prepared, "_GROUP_BYTES", group_bytes)
    checkpoint, tensors = save(tmp_path / "model", stored)
    table = TABLE.made_of(element).by_output()
    assert WeightTable.from_json(table.to_json()) == table and table.is_by_output and not TABLE.is_by_output
    identity = prepared.prepare(table, checkpoint, tmp_path / "weights", threads=2)
    read = prepared.load(tmp_path / "weights", threads=2, expected_id=identity)
    arena = Arena(prepared.layout_of(table))
    dtype = np.dtype(getattr(ml_dtypes, element, element))
    for found in (read, prepared.prepare_into(table, checkpoint, arena, threads=2)):
        assert list(found) == [weight.name for weight in TABLE.weights]
        assert {array.dtype for array in found.values()} == {dtype}
        np.testing.assert_array_equal(found["embed"], tensors["embed"].astype(dtype))
        np.testing.assert_array_equal(found["head"], tensors["head"].astype(dtype))
        for kind in KINDS:
            for layer in range(LAYERS):
                parts = [tensors[f"layers.{layer}.{source}"] for source in kind.sources]
                np.testing.assert_array_equal(found[f"blocks.{layer}.{kind.name}"], np.concatenate(parts).astype(dtype))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_of_inputs_are_rounded_as_well(tmp_path: Path, stored: type) -> None:
    checkpoint, tensors = save(tmp_path / "model", stored)
    table = TABLE.made_of("bfloat16")
    found = prepared.prepare_into(table, checkpoint, Arena(prepared.layout_of(table)), threads=1)
    wanted = np.concatenate([tensors[f"layers.1.{part}"].T for part in "qkv"], axis=1)
    np.testing.assert_array_equal(found["blocks.1.qkv"], wanted.astype(ml_dtypes.bfloat16))
