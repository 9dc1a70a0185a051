"""Prepared weights: what they hold against the safetensors library, and that no damage goes unnoticed."""

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from max import CacheError, WeightError
from max.compiler.weights import Weight, WeightTable
from max.runtime import prepared, prepared_format, weight_reads
from max.runtime.arena import Arena
from max.runtime.checkpoint import Checkpoint
from max.runtime.prepared import layout_of, load, prepare, prepare_into

RANDOM = np.random.default_rng(0)

TABLE = WeightTable(
    (
        Weight("embed", (300, 40), ("embed",)),
        Weight("norm", (40,), ("norm",)),
        Weight("qkv", (40, 70), ("q", "k", "v"), (40, 20, 10), transposed=True),
        Weight("bias", (70,), ("q_bias", "k_bias", "v_bias"), (40, 20, 10)),
        Weight("gate_up", (40, 2000), ("gate", "up"), (1000, 1000), transposed=True),
        Weight("rows", (7, 3), ("upper", "lower"), (3, 4)),
        Weight("big", (600, 3000), ("big",), transposed=True),
    )
)


def save_checkpoint(folder: Path, table: WeightTable, dtype: Any = np.float32) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    shapes = dict(source for weight in table.weights for source in weight.source_shapes())
    save_file(
        {name: RANDOM.standard_normal(shape).astype(dtype) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return Checkpoint.open(folder)


def expected(checkpoint: Checkpoint, table: WeightTable) -> dict[str, np.ndarray]:
    stored = load_file(checkpoint.path / "model.safetensors")
    weights = {}
    for weight in table.weights:
        parts = [stored[source].astype(np.float32) for source in weight.sources]
        axis = -1 if weight.transposed else 0
        weights[weight.name] = np.concatenate([part.T if weight.transposed else part for part in parts], axis=axis)
    return weights


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(found) == list(wanted)
    for name, weight in wanted.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", TABLE)


@pytest.mark.parametrize("group_bytes", [1, 100_000, 32 << 20])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("with_arena", [False, True])
def test_what_is_prepared_is_what_the_checkpoint_holds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Checkpoint,
    group_bytes: int,
    threads: int,
    with_arena: bool,
) -> None:
    monkeypatch.setattr(prepared, "_GROUP_BYTES", group_bytes)
    monkeypatch.setattr(weight_reads, "_JOB_BYTES", 50_000)
    wanted = expected(checkpoint, TABLE)
    arena = Arena(layout_of(TABLE)) if with_arena else None
    path = tmp_path / "weights"
    identity = prepare(TABLE, checkpoint, path, threads=threads, arena=arena)
    if arena:
        assert_equal(arena.views(), wanted)
    assert_equal(load(path, threads=threads, expected_id=identity), wanted)
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_and_the_id_depend_on_the_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    first = prepare(TABLE, checkpoint, tmp_path / "a", threads=1)
    monkeypatch.setattr(prepared, "_GROUP_BYTES", 1)
    assert prepare(TABLE, checkpoint, tmp_path / "b", threads=4, arena=Arena(layout_of(TABLE))) == first
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = save_checkpoint(tmp_path / "other", TABLE)
    assert prepare(TABLE, other, tmp_path / "c", threads=1) != first


def test_the_file_holds_the_arena_s_bytes_and_its_id_is_the_digest_of_the_toc(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    arena = Arena(layout_of(TABLE))
    identity = prepare(TABLE, checkpoint, tmp_path / "weights", threads=2, arena=arena)
    content = (tmp_path / "weights").read_bytes()
    assert content[4096 : 4096 + arena.nbytes] == arena.memory.tobytes()
    toc = content[4096 + arena.nbytes :]
    assert hashlib.sha256(toc).hexdigest() == identity
    fields = json.loads(toc)
    assert fields["packing"] == "rows-or-panels-32-v1"
    assert len(fields["chunks"]) == 2 == -(-arena.nbytes // (4 << 20))


@pytest.mark.parametrize("kept_share", [0.0, 1.0])
def test_a_given_arena_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kept_share: float
) -> None:
    monkeypatch.setattr(prepared, "_KEPT_SHARE", kept_share)
    prepare(TABLE, checkpoint, tmp_path / "weights", threads=2)
    arena = Arena(layout_of(TABLE))
    views = load(tmp_path / "weights", arena, threads=2)
    assert_equal(views, expected(checkpoint, TABLE))
    assert all(np.shares_memory(view, arena.memory) for view in views.values())


def test_an_arena_is_filled_without_a_file(checkpoint: Checkpoint) -> None:
    arena = Arena(layout_of(TABLE))
    assert_equal(prepare_into(TABLE, checkpoint, arena, threads=2), expected(checkpoint, TABLE))


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model", TABLE, np.float16)
    prepare(TABLE, checkpoint, tmp_path / "weights", threads=2)
    assert_equal(load(tmp_path / "weights", threads=2), expected(checkpoint, TABLE))


def test_no_weights_are_a_file_too(tmp_path: Path, checkpoint: Checkpoint) -> None:
    table = WeightTable((), ignored=("*",))
    prepare(table, checkpoint, tmp_path / "weights", threads=1)
    assert load(tmp_path / "weights", threads=1) == {}


def test_progress_is_told_before_the_first_group_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    monkeypatch.setattr(weight_reads, "_JOB_BYTES", 50_000)
    steps: list[tuple[int, int]] = []
    prepare(TABLE, checkpoint, tmp_path / "weights", threads=2, on_progress=lambda *step: steps.append(step))
    assert steps[0][0] == 0 and len(steps) > 30


def test_progress_grows_to_the_whole(tmp_path: Path, checkpoint: Checkpoint) -> None:
    arena = Arena(layout_of(TABLE))
    path = tmp_path / "weights"
    runs: list[Callable[[Any], object]] = [
        lambda seen: prepare(TABLE, checkpoint, path, threads=2, on_progress=seen),
        lambda seen: load(path, threads=2, on_progress=seen),
        lambda seen: prepare_into(TABLE, checkpoint, arena, threads=2, on_progress=seen),
    ]
    for run in runs:
        steps: list[tuple[int, int]] = []
        run(lambda done, total, steps=steps: steps.append((done, total)))
        assert len(steps) > 1 and steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] == steps[0][1] > 0


# --- what cannot be prepared


def test_a_checkpoint_that_does_not_fit_leaves_no_file(tmp_path: Path, checkpoint: Checkpoint) -> None:
    table = WeightTable((*TABLE.weights, Weight("more", (2,), ("more",))))
    with pytest.raises(WeightError, match="more"):
        prepare(table, checkpoint, tmp_path / "weights", threads=1)
    with pytest.raises(WeightError, match="more"):
        prepare_into(table, checkpoint, Arena(layout_of(table)), threads=1)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_shrinks_leaves_no_file(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model", TABLE)
    os.truncate(checkpoint.path / "model.safetensors", 100_000)
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightError, match="ends before byte"):
        prepare(TABLE, checkpoint, tmp_path / "out" / "weights", threads=2)
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_a_cache_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheError, match="No such file"):
        prepare(TABLE, checkpoint, tmp_path / "absent" / "weights", threads=1)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheError, match="No space left"):
        prepare(TABLE, checkpoint, tmp_path / "weights", threads=2)
    assert not list(tmp_path.iterdir())


# --- what cannot be loaded


SMALL = WeightTable((Weight("a", (8, 4), ("a",), transposed=True), Weight("b", (5,), ("b",))))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file: 4096 bytes of header, 8192 of data, then the TOC."""
    folder = tmp_path_factory.mktemp("small")
    prepare(SMALL, save_checkpoint(folder / "model", SMALL), folder / "weights", threads=1)
    return folder / "weights"


def loading_fails(path: Path, content: bytes, match: str | None = None, **options: Any) -> None:
    path.write_bytes(content)
    with pytest.raises(CacheError, match=match) as caught:
        load(path, threads=1, **options)
    assert caught.value.message.startswith(str(path)) and caught.value.hint


FUZZ = settings(max_examples=2 * settings().max_examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(at=st.floats(0, 1, exclude_max=True), region=st.sampled_from(["header", "data", "toc"]), bit=st.integers(0, 7))
def test_every_flipped_bit_is_noticed(tmp_path: Path, small: Path, at: float, region: str, bit: int) -> None:
    content = bytearray(small.read_bytes())
    start, stop = {"header": (0, 80), "data": (80, 12288), "toc": (12288, len(content))}[region]
    content[start + int(at * (stop - start))] ^= 1 << bit
    loading_fails(tmp_path / "weights", bytes(content))


@FUZZ
@given(length=st.integers(0, 13_000), junk=st.binary(max_size=3))
def test_every_other_length_is_noticed(tmp_path: Path, small: Path, length: int, junk: bytes) -> None:
    whole = small.read_bytes()
    content = whole[:length] + junk
    if content != whole:
        loading_fails(tmp_path / "weights", content)


def test_foreign_files_are_refused(tmp_path: Path, small: Path) -> None:
    path, whole = tmp_path / "weights", small.read_bytes()
    loading_fails(path, b"", "not a file of prepared weights")
    loading_fails(path, b"\x7fELF" * 4000, "not a file of prepared weights")
    loading_fails(path, whole[:8] + b"\x02" + whole[9:], "version 2")
    loading_fails(path, whole, "its id is", expected_id="0" * 64)
    loading_fails(path, whole, "not those of this model", arena=Arena([("a", (8, 4), "float32")]))
    with pytest.raises(CacheError, match="No such file"):
        load(tmp_path / "absent", threads=1)
    with pytest.raises(CacheError, match="cannot be read"):
        load(tmp_path, threads=1)


def with_toc(content: bytes, change: Callable[[dict[str, Any]], object] | bytes) -> bytes:
    """The file with another TOC that passes for whole: sizes and digest are right."""
    magic, version, header_bytes, _, offset, _, _ = struct.unpack_from("<8sIIQQQ32s", content)
    if isinstance(change, bytes):
        toc = change
    else:
        fields = json.loads(content[offset:])
        change(fields)
        toc = json.dumps(fields).encode()
    sizes = offset + len(toc), offset, len(toc)
    header = struct.pack("<8sIIQQQ32s", magic, version, header_bytes, *sizes, hashlib.sha256(toc).digest())
    return header.ljust(4096, b"\0") + content[4096:offset] + toc


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object] | bytes, str]] = {
    "not JSON": (b"{", "cannot be used"),
    "not an object": (b"[]", "cannot be used"),
    "deep": (b"[" * 100_000, "cannot be used"),
    "a key less": (lambda toc: toc.pop("chunks"), "chunks"),
    "another packing": (lambda toc: toc.update(packing="panels-v1"), "packed as panels-v1"),
    "another dtype": (lambda toc: toc["tensors"][0].update(dtype="object"), "dtype or shape"),
    "a negative shape": (lambda toc: toc["tensors"][0].update(shape=[-8, -4]), "dtype or shape"),
    "a shape of text": (lambda toc: toc["tensors"][0].update(shape="84"), "dtype or shape"),
    "a shape out of bounds": (lambda toc: toc["tensors"][1].update(shape=[1 << 62]), "follow each other"),
    "an offset out of bounds": (lambda toc: toc["tensors"][1].update(offset=1 << 40), "follow each other"),
    "a tensor less": (lambda toc: toc["tensors"].pop(), "follow each other"),
    "a name twice": (lambda toc: toc["tensors"][1].update(name="a"), "one name"),
    "a chunk less": (lambda toc: toc["chunks"].pop(), "cover"),
    "other chunks": (lambda toc: toc.update(chunk_bytes=4096), "cover"),
    "another hash": (lambda toc: toc.update(chunks=["0" * 16]), "chunk at byte 4096 is damaged"),
    "no hash": (lambda toc: toc.update(chunks=["x"]), "cannot be used"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_toc_of_another_program_is_refused(tmp_path: Path, small: Path, name: str) -> None:
    change, message = CHANGES[name]
    loading_fails(tmp_path / "weights", with_toc(small.read_bytes(), change), message)


def test_a_toc_rewritten_as_it_was_is_accepted(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(with_toc(small.read_bytes(), lambda toc: None))
    assert list(load(path, threads=1)) == ["a", "b"]


def test_a_file_of_another_packing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    with monkeypatch.context() as other:
        other.setattr(prepared_format, "PACKING", "panels-v1")
        prepare(TABLE, checkpoint, tmp_path / "weights", threads=1)
        load(tmp_path / "weights", threads=1)
    with pytest.raises(CacheError, match="packed as panels-v1, needed is rows-or-panels-32-v1"):
        load(tmp_path / "weights", threads=1)


def test_loading_imports_neither_jax_nor_the_architectures() -> None:
    code = "import max.runtime.prepared, sys; sys.exit(any(name in sys.modules for name in ('jax', 'max.models')))"
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0
