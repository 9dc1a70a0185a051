"""Checkpoint folders: what opens, what is refused and how, and tensors against the safetensors library."""

import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save, save_file

from max import ModelError, WeightError
from max.compiler.weights import Weight, WeightTable
from max.runtime import tensor_stream
from max.runtime.checkpoint import Checkpoint
from max.runtime.safetensors_file import read_header

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
RANDOM = np.random.default_rng(0)


def folder_of(path: Path, tensors: dict[str, np.ndarray] | None = None, config: Any = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({"w": np.ones((2, 3), np.float32)} if tensors is None else tensors, path / "model.safetensors")
    return path


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


# --- opening


def test_a_folder_shows_its_config_its_tensors_and_its_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", {"a": normal(4, 3), "b": normal(2).astype(np.float16)})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.architecture == "LlamaForCausalLM" and checkpoint.config == CONFIG
    assert {file.name for file in checkpoint.files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in checkpoint.tensors.items()} == {
        "a": ("F32", (4, 3), 48),
        "b": ("F16", (2,), 4),
    }


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    a, b = normal(3, 2), normal(5)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": a, "twice": a}, tmp_path / "model-1.safetensors")
    save_file({"b": b, "twice": a + 1}, tmp_path / "model-2.safetensors")
    placed = {"a": "model-1.safetensors", "b": "model-2.safetensors", "twice": "model-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    checkpoint = Checkpoint.open(tmp_path)
    assert {name: tensor.file.name for name, tensor in checkpoint.tensors.items()} == placed
    out = np.empty((3, 2), np.float32)
    checkpoint.read_into("twice", out)
    np.testing.assert_array_equal(out, a)


def test_the_identity_is_json_and_changes_with_the_header_the_config_and_any_file(tmp_path: Path) -> None:
    def identity() -> dict[str, Any]:
        return json.loads(json.dumps(Checkpoint.open(tmp_path).identity()))

    folder_of(tmp_path, {"a": normal(2)})
    first = identity()
    assert first == identity() and first["path"] == str(tmp_path.resolve())
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    touched = identity()
    assert touched["sha256"] == first["sha256"] and touched["files"] != first["files"]
    folder_of(tmp_path, {"a": normal(2)}, {**CONFIG, "hidden_size": 9})
    other_config = identity()["sha256"]
    folder_of(tmp_path, {"a": normal(3)})
    assert len({first["sha256"], other_config, identity()["sha256"]}) == 3


def test_neither_checkpoints_nor_the_table_import_jax() -> None:
    code = "import max.runtime.checkpoint, max.models.table, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0


# --- folders that are refused


def opening_fails(folder: Path, kind: type[ModelError] = ModelError) -> ModelError:
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(folder)
    assert type(caught.value) is kind and caught.value.message and caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "there is no folder" in opening_fails(tmp_path / "absent").message
    assert "Nothing is downloaded" in opening_fails(Path("org/name-1.5B")).hint
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file" in opening_fails(tmp_path / "model.safetensors").message
    assert "no config.json" in opening_fails(tmp_path).message
    opening_fails(Path("x" * 5000))
    opening_fails(Path("nul\0"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("\x80\x81", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "names no architecture"),
        ('{"architectures": []}', "names no architecture"),
        ('{"architectures": [7]}', "names no architecture"),
        ('{"architectures": "Llama"}', "names no architecture"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    folder = folder_of(tmp_path)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert message in opening_fails(folder).message


def test_no_weights_and_weights_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "holds no weights" in opening_fails(tmp_path).message
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin" in opening_fails(tmp_path).message


def test_all_missing_shards_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"w{i}": f"part-{i}.safetensors" for i in range(3)}}))
    save_file({"w1": normal(1)}, tmp_path / "part-1.safetensors")
    error = opening_fails(tmp_path)
    assert "2 of 3" in error.message and "part-0.safetensors, part-2.safetensors" in error.message
    index.write_text(json.dumps({"weight_map": {"w1": "part-1.safetensors", "w2": "part-1.safetensors"}}))
    assert "w2 in part-1.safetensors" in opening_fails(tmp_path, WeightError).message


@pytest.mark.parametrize("placed", [None, [], {}, {"w": 1}, {"w": "../other.safetensors"}, {"w": "/etc/passwd"}])
def test_an_index_stays_within_its_folder(tmp_path: Path, placed: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert "weight_map" in opening_fails(tmp_path).message


# --- headers


HUGE = 1 << 62
DAMAGED = {
    "empty": (b"", "truncated"),
    "shorter than a length": (b"\x01\x00", "truncated"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html></html>", "claims a header"),
    "header over the limit": (struct.pack("<Q", 100_000_001) + b"{}", "claims a header"),
    "header over the end": (struct.pack("<Q", 100) + b"{}", "truncated"),
}
HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{]", b"", "not a JSON object"),
    "an array": (b"[]", b"", "not a JSON object"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not a JSON object"),
    "lone surrogate": (b'{"\\ud800": 1}', b"", "not a JSON object"),
    "deep": (b'{"a":' * 100_000, b"", "nested too deeply"),
    "a name twice": (b'{"a": 1, "a": 2}', b"", "twice"),
    "not a number": (b'{"a": NaN}', b"", "NaN"),
    "an endless number": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not a JSON object"),
    "entry not an object": ({"w": 3}, b"", "not an object"),
    "unknown dtype": ({"w": entry("F128")}, bytes(4), "dtype 'F128' is not known"),
    "no dtype": ({"w": entry(None)}, bytes(4), "dtype None"),
    "negative size": ({"w": entry(shape=[-1])}, bytes(4), "shape [-1]"),
    "boolean size": ({"w": entry(shape=[True])}, bytes(4), "shape [True]"),
    "fractional size": ({"w": entry(shape=[1.0])}, bytes(4), "shape [1.0]"),
    "one offset": ({"w": entry(offsets=[0])}, bytes(4), "two offsets"),
    "offsets backwards": ({"w": entry(offsets=[4, 0])}, bytes(4), "another size"),
    "offsets of another size": ({"w": entry(offsets=[0, 8])}, bytes(8), "another size"),
    "overflowing shape": ({"w": entry(shape=[HUGE] * 60)}, bytes(4), "another size"),
    "gap": ({"v": entry(), "w": entry(offsets=[8, 12])}, bytes(12), "'w' leaves a gap"),
    "overlap": ({"v": entry(), "w": entry(offsets=[0, 4])}, bytes(4), "overlaps"),
    "data cut off": ({"v": entry(), "w": entry(offsets=[4, 8])}, bytes(7), "truncated"),
    "data left over": ({"w": entry()}, bytes(5), "1 bytes longer"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_are_no_safetensors(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    assert message in opening_fails(folder, WeightError).message
    with pytest.raises(SafetensorError):
        deserialize(content)


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(tmp_path: Path, name: str) -> None:
    header, data, message = HEADERS[name]
    folder = folder_of(tmp_path)
    file = with_header(folder / "model.safetensors", header, data)
    assert message in opening_fails(folder, WeightError).message
    with pytest.raises(SafetensorError):
        deserialize(file.read_bytes())


def test_more_axes_than_numpy_has_are_refused(tmp_path: Path) -> None:
    file = with_header(tmp_path / "w.safetensors", {"w": entry(shape=[1] * 65)}, bytes(4))
    with pytest.raises(WeightError, match="not a list of sizes"):
        read_header(file)


SIZES = st.one_of(st.integers(-1, 6), st.sampled_from([HUGE, 1 << 63, 1 << 64, True, 1.0, None, "1"]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I8", "BOOL", "F128", 3, None]),
        "shape": st.one_of(st.lists(SIZES, max_size=3), SIZES),
        "data_offsets": st.one_of(st.lists(SIZES, min_size=1, max_size=3), SIZES),
    }
)
JSON_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)


def both_judge(file: Path, content: bytes) -> None:
    """Ours refuses with WeightError exactly where the safetensors library refuses, and else agrees with it."""
    file.write_bytes(content)
    try:
        tensors = dict(deserialize(content))
    except SafetensorError:
        with pytest.raises(WeightError):
            read_header(file)
    else:
        found = read_header(file).tensors
        assert {name: (at.dtype, list(at.shape), at.nbytes) for name, at in found.items()} == {
            name: (at["dtype"], at["shape"], len(at["data"])) for name, at in tensors.items()
        }


FUZZ = settings(
    max_examples=settings().max_examples * 3 // 2, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(header=st.dictionaries(st.text(max_size=3), st.one_of(ENTRIES, JSON_VALUES), max_size=3), size=st.integers(0, 9))
def test_any_header_is_judged_as_the_library_judges_it(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    raw = json.dumps(header).encode()
    both_judge(tmp_path / "w.safetensors", struct.pack("<Q", len(raw)) + raw + bytes(size))


VALID = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, {"format": "pt"})


@FUZZ
@given(data=st.data())
def test_a_damaged_file_is_judged_as_the_library_judges_it(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(VALID[: data.draw(st.integers(0, len(VALID)))] if data.draw(st.booleans()) else VALID)
    for at in data.draw(st.lists(st.integers(0, max(len(content) - 1, 0)), max_size=3)) if content else []:
        content[at] = data.draw(st.integers(0, 255))
    both_judge(tmp_path / "w.safetensors", bytes(content))


# --- the tensors against the weight table


def test_every_wrong_tensor_is_named_in_one_error(tmp_path: Path) -> None:
    tensors = {
        "good": normal(4),
        "turned": normal(2, 3),
        "whole": np.ones(4, np.int32),
        "extra": normal(1),
        "a.rotary_emb.inv_freq": normal(1),
    }
    checkpoint = Checkpoint.open(folder_of(tmp_path, tensors))
    table = WeightTable(
        (
            Weight("good", (4,), ("good",)),
            Weight("turned", (2, 3), ("turned",), transposed=True),
            Weight("whole", (4,), ("whole",)),
            *(Weight(f"absent{i}", (1,), (f"absent{i}",)) for i in range(40)),
        ),
        ignored=("*.rotary_emb.inv_freq",),
    )
    with pytest.raises(WeightError) as caught:
        checkpoint.check(table)
    message = caught.value.message
    assert "40 missing (absent0, absent1," in message and "absent11, and 28 more)" in message
    assert "1 unexpected (extra)" in message
    assert "1 misshapen (turned is (2, 3), config.json needs (3, 2))" in message
    assert "1 of a type that is not read (whole is I32)" in message
    assert "good" not in message and "inv_freq" not in message


def test_the_right_tensors_pass(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_of(tmp_path, {"q": normal(3, 4), "k": normal(2, 4)}))
    checkpoint.check(WeightTable((Weight("qk", (4, 5), ("q", "k"), (3, 2), transposed=True),)))


# --- reading


STORED = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
SHAPES = [(), (1,), (7,), (0, 4), (3, 1), (1, 3), (200, 130), (130, 4100), (2, 3, 4)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_bytes", [1, 100_000, 4 << 20])
def test_a_tensor_reads_as_the_library_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, shape: tuple[int, ...], block_bytes: int
) -> None:
    monkeypatch.setattr(tensor_stream, "BLOCK_BYTES", block_bytes)
    stored = np.asarray(RANDOM.standard_normal(shape)).astype(dtype)
    folder = folder_of(tmp_path, {"before": normal(3), "w": stored})
    oracle = dict(deserialize((folder / "model.safetensors").read_bytes()))["w"]
    expected = np.ndarray(oracle["shape"], dtype, bytes(oracle["data"])).astype(np.float32)
    checkpoint = Checkpoint.open(folder)
    out = np.full(shape, np.nan, np.float32)
    checkpoint.read_into("w", out)
    np.testing.assert_array_equal(out, expected)
    if len(shape) == 2:
        fused = np.full((shape[1], shape[0] + 5), np.nan, np.float32)
        checkpoint.read_into("w", fused[:, 2:-3], transposed=True)
        np.testing.assert_array_equal(fused[:, 2:-3], expected.T)
        assert np.isnan(fused[:, :2]).all() and np.isnan(fused[:, -3:]).all()


def test_special_values_survive_the_conversion(tmp_path: Path) -> None:
    values = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 65504.0, 1 / 3]
    tensors = {
        "BF16": np.array(values, np.float32).astype(ml_dtypes.bfloat16),
        "F16": np.array([v if abs(v) < 1e5 else np.inf for v in values], np.float16),
        "F64": np.array([*values[:-1], 1e300]),
    }
    checkpoint = Checkpoint.open(folder_of(tmp_path, tensors))
    for name, stored in tensors.items():
        out = np.empty(len(values), np.float32)
        checkpoint.read_into(name, out)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(out, stored.astype(np.float32))
        np.testing.assert_array_equal(np.signbit(out), np.signbit(stored.astype(np.float64)))


def test_threads_may_read_parts_of_one_tensor(tmp_path: Path) -> None:
    stored = normal(301, 517)
    checkpoint = Checkpoint.open(folder_of(tmp_path, {"w": stored}))
    out = np.empty((517, 301), np.float32)

    def read(first: int) -> None:
        last = min(first + 40, 301)
        checkpoint.read_into("w", out[:, first:last], transposed=True, rows=(first, last))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(0, 301, 40)))
    np.testing.assert_array_equal(out, stored.T)


def test_a_file_that_shrinks_or_vanishes_is_an_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"w": normal(1000)})
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model.safetensors", 2000)
    out = np.empty(1000, np.float32)
    with pytest.raises(WeightError, match="ends before byte"):
        checkpoint.read_into("w", out)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightError, match="cannot be read"):
        checkpoint.read_into("w", out)
