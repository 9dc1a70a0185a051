"""Which encoding weights are packed in, and what packed weights hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from max import ConfigError
from max.cache.binding import checkpoint_identity
from max.compiler import Target, native
from max.compiler.native_functions import Encoding
from max.compiler.native_packing import BLOCKS
from max.compiler.panels import Packing, packed_shape, packing_of, packs
from max.compiler.weights import Weight, WeightTable
from max.runtime.arena import Arena
from max.runtime.checkpoint import Checkpoint
from max.runtime.config import BatchConfig
from max.runtime.preparation_report import Report
from max.runtime.prepared import layout_of, load, prepare, prepare_into
from max.runtime.weight_preparation import choose_packing, choose_page_format, find_or_prepare

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the kernels were not built: no C++ compiler")
CPU = Target.parse("cpu")
QKV = Weight("qkv", (5, 41), ("q", "k", "v"), (33, 4, 4), transposed=True)
GATE_UP = Weight("gate_up", (7, 2 * 37), ("gate", "up"), (37, 37), transposed=True, gated=True)
NORM = Weight("norm", (5,), ("n",))
TABLE = WeightTable((QKV, GATE_UP, NORM))


def checkpoint(folder: Path, dtype: str) -> Checkpoint:
    rng = np.random.default_rng(0)
    tensors = {name: shape for weight in TABLE.weights for name, shape in weight.source_shapes()}
    kind = np.float32 if dtype == "F32" else ml_dtypes.bfloat16
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    arrays = {name: rng.standard_normal(shape).astype(kind) for name, shape in tensors.items()}
    save_file(arrays, folder / "model.safetensors")
    return Checkpoint.open(folder)


def read(source: Checkpoint, name: str) -> np.ndarray:
    out = np.empty(source.tensors[name].shape, np.float32)
    source.read_into(name, out)
    return out


@needs_kernels
@pytest.mark.parametrize(
    ("stored", "wanted", "packing"),
    [
        ("F32", None, "float32"),
        ("BF16", None, "bfloat16"),
        ("F32", "bfloat16", "bfloat16"),
        ("BF16", "float32", "float32"),
    ],
)
def test_the_encoding_is_the_one_asked_for_or_the_checkpoint_s(
    tmp_path: Path, stored: str, wanted: Packing | None, packing: Packing
) -> None:
    assert choose_packing(wanted, checkpoint(tmp_path / "model", stored), CPU) == packing


def test_without_kernels_everything_is_float32_in_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "library_path", lambda: None)
    source = checkpoint(tmp_path / "model", "BF16")
    assert choose_packing(None, source, CPU) == ""
    assert "compiler" in caplog.text
    with pytest.raises(ConfigError, match="kernels"):
        choose_packing("bfloat16", source, CPU)


@pytest.mark.skipif("CI" not in os.environ, reason="a development machine may do without a compiler")
def test_kernels_are_there_where_changes_are_judged() -> None:
    assert native.library() is not None, native.how_to_get()


@pytest.mark.parametrize(("packing", "inputs"), [("q8_0", 32), ("q4_0", 32), ("q4_k", 256), ("q6_k", 256)])
def test_quantizing_refuses_widths_that_are_no_whole_blocks(packing: Packing, inputs: int) -> None:
    assert packs(packing, 3 * inputs) and not packs(packing, 3 * inputs - 1)
    with pytest.raises(ConfigError, match="multiples of 32"):  # which q4_k and q6_k fall back to
        TABLE.pack(packing).weights[0].stored_shape  # noqa: B018  the shape is computed when it is asked for


@needs_kernels
@pytest.mark.parametrize("packing", get_args(Encoding))
@pytest.mark.parametrize("gated", [False, True])
def test_sizes_are_those_of_the_kernels(packing: Packing, gated: bool) -> None:
    library = native.library()
    assert library is not None and packing
    for inputs in (256, 768) if packing in BLOCKS else (1, 2, 5, 64):
        for outputs in (1, 15, 16, 17, 31, 32, 33, 100):
            columns = 2 * outputs if gated else outputs
            wanted = library.packed_bytes(packing, inputs, outputs, gated=gated)
            shape = packed_shape(packing, inputs, columns, gated=gated)
            assert shape[0] * shape[1] == wanted and packing_of(shape) == packing


@needs_kernels
@pytest.mark.parametrize("packing", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_packed_weights_multiply_as_the_checkpoint_s(tmp_path: Path, packing: Packing, stored: str) -> None:
    library = native.library()
    assert library is not None and packing
    source, table = checkpoint(tmp_path / "model", stored), TABLE.pack(packing)
    views = prepare_into(table, source, Arena(layout_of(table)), threads=2)
    identity = prepare(table, source, tmp_path / "weights", threads=2)
    kept = load(tmp_path / "weights", threads=2, expected_id=identity)
    assert all(np.array_equal(kept[name], view) for name, view in views.items())

    # The kernels may round activations to bfloat16 beside such weights.
    tolerance = 1e-5 if packing == "float32" else 2e-2
    rng = np.random.default_rng(1)
    x5, x7 = rng.standard_normal((3, 5)).astype(np.float32), rng.standard_normal((3, 7)).astype(np.float32)
    y = np.full((3, 41), np.nan, np.float32)
    library.matmul(x5, views["qkv"], y, packing)
    np.testing.assert_allclose(
        y, x5 @ np.concatenate([read(source, n) for n in "qkv"]).T, rtol=tolerance, atol=5 * tolerance
    )
    y = np.full((3, 37), np.nan, np.float32)
    library.matmul(x7, views["gate_up"], y, packing, epilogue="swiglu")
    gate, up = x7 @ read(source, "gate").T, x7 @ read(source, "up").T
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=tolerance, atol=10 * tolerance)
    np.testing.assert_array_equal(views["norm"], read(source, "n"))


@pytest.mark.parametrize("changed", [None, "packing", "kernels", "sources"])
def test_weights_that_other_code_laid_out_are_made_anew(tmp_path: Path, changed: str | None) -> None:
    source = checkpoint(tmp_path / "model", "F32")
    factors = {"packing": "", "kernels": ["a_v1"], "sources": "0"}
    before = factors | ({changed: "other"} if changed else {})
    binding = SimpleNamespace(checkpoint=checkpoint_identity(source.identity()), factors=before, prepared="ab" * 32)
    kept = tmp_path / "weights"
    store: Any = SimpleNamespace(bindings=lambda: [binding], prepared_path=lambda identity: kept, writable=False)
    report = Report()
    found = find_or_prepare(TABLE, source, store, report, lambda *_: None, made_by=factors, keep=False)
    assert found.file == (None if changed else kept)
    assert report.weights_prepared == bool(changed)


def test_pages_are_no_wider_than_packed_weights_unless_asked_for():
    formats = [choose_page_format(None, packing, "float32") for packing in ("", "float32", "bfloat16", "q8_0", "q4_k")]
    assert formats == ["float32", "float32", "bfloat16", "bfloat16", "bfloat16"]
    assert choose_page_format("float32", "q8_0", "float32") == "float32"
    assert choose_page_format("bfloat16", "", "float32") == "bfloat16"


def test_a_format_of_pages_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="float8_e4m3fn is not supported on cpu yet"):
        BatchConfig(kv_cache_format="float8_e4m3fn")


_PREPARE = """
import resource, sys
from pathlib import Path
from max.compiler.weights import Weight, WeightTable
from max.runtime.arena import Arena
from max.runtime.checkpoint import Checkpoint
from max.runtime.prepared import layout_of, prepare
weights = [Weight(f"w{at}", (1024, 4096), (f"w{at}",), transposed=True) for at in range(10)]
table = WeightTable(tuple(weights)).pack(sys.argv[2])
checkpoint, arena = Checkpoint.open(Path(sys.argv[1])), Arena(layout_of(table))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(table, checkpoint, Path(sys.argv[1]) / "prepared", threads=2, arena=arena)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, arena.nbytes)
"""


@needs_kernels
@pytest.mark.quick(packing=["q8_0"])
@pytest.mark.parametrize("packing", ["float32", "q8_0"])
def test_preparing_streams_the_checkpoint(tmp_path: Path, packing: Packing) -> None:
    """168 MB of float32: beside the arena there are a few parts of it in memory, never the whole."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    block = np.random.default_rng(0).standard_normal((4096, 1024), np.float32)
    save_file({f"w{at}": block for at in range(10)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", _PREPARE, str(tmp_path), packing]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    grown, arena = map(int, done.stdout.split())
    assert grown - arena < 80e6
