"""GGUF headers: what the package writes is read alike, and whatever else a file holds is an error of two lines."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from max import WeightError
from max.runtime import gguf_file
from max.runtime.gguf_file import read_header

HUGE = 1 << 60
METADATA: dict[str, tuple[str, Any]] = {
    "general.name": ("string", "näme"),
    "a.flag": ("bool", True),
    "a.small": ("int8", -3),
    "a.big": ("uint64", 1 << 63),
    "a.number": ("float32", 0.5),
    "a.double": ("float64", 1e300),
    "a.texts": ("array", ["", "ä", "<s>"]),
    "a.counts": ("array", [1, -2, 3]),
    "a.scores": ("array", [1.5, -2.0]),
}


def written(path: Path, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in METADATA.items():
        getattr(writer, f"add_{kind}")(key, value)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 256)).astype(np.float32)
    writer.add_tensor("norm", np.ones(5, np.float32))
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16):
        writer.add_tensor(kind.name, gguf.quantize(values, kind), raw_dtype=kind)
    for kind, block_bytes in ((gguf.GGMLQuantizationType.Q4_K, 144), (gguf.GGMLQuantizationType.Q6_K, 210)):
        blocks = rng.integers(0, 256, (3, block_bytes), np.uint8)
        writer.add_tensor(kind.name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_a_header_is_read_as_the_package_reads_it(tmp_path: Path, alignment: int | None) -> None:
    file = written(tmp_path / "m.gguf", alignment)
    header, reader = read_header(file), gguf.GGUFReader(file)
    for key, (_, value) in METADATA.items():
        found = header.metadata[key]
        assert (list(found) if isinstance(value, list) else found) == value
    assert {name: (at.dtype, at.shape, at.offset, at.nbytes) for name, at in header.tensors.items()} == {
        tensor.name: (tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1]), tensor.data_offset, tensor.n_bytes)
        for tensor in reader.tensors
    }


def test_a_long_header_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "m.gguf")
    whole = read_header(file)
    monkeypatch.setattr(gguf_file, "_FIRST_READ", 31)
    pieces = read_header(file)
    assert pieces.sha256 == whole.sha256 and pieces.tensors == whole.tensors
    assert list(pieces.metadata["a.texts"]) == METADATA["a.texts"][1]
    monkeypatch.setattr(gguf_file, "MAX_HEADER_BYTES", 300)
    assert "over 300 bytes" in fails(file)


# --- files that are refused


def fails(file: Path) -> str:
    with pytest.raises(WeightError) as caught:
        read_header(file)
    assert caught.value.hint and "\n" not in caught.value.message + caught.value.hint
    return caught.value.message


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header_of(*, keys: bytes = b"", tensors: bytes = b"", num_keys: int = 0, num_tensors: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, num_keys) + keys + tensors


def tensor(name: str = "w", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


DAMAGED = {
    "empty": (b"", "no GGUF file"),
    "magic": (b"GGML" + bytes(40), "no GGUF file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
    "short": (b"GGUF\3\0\0\0", "truncated"),
    "version 1": (struct.pack("<4sIII", b"GGUF", 1, 0, 0) + bytes(20), "of version 1"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "2^60 tensors": (header_of(num_tensors=HUGE), f"claims {HUGE} tensors"),
    "2^60 keys": (header_of(num_keys=HUGE), "keys in 24 bytes"),
    "long key": (header_of(num_keys=1, keys=struct.pack("<Q", HUGE) + bytes(50)), "truncated"),
    "key twice": (header_of(num_keys=2, keys=2 * (text("a") + struct.pack("<IB", 0, 1))), "twice"),
    "kind of value": (header_of(num_keys=1, keys=text("a") + struct.pack("<IB", 99, 1)), "unknown kind 99"),
    "kind of array": (header_of(num_keys=1, keys=text("a") + struct.pack("<IIQ", 9, 9, 0)), "array of the unknown"),
    "long array": (header_of(num_keys=1, keys=text("a") + struct.pack("<IIQ", 9, 4, HUGE)), "truncated"),
    "many strings": (header_of(num_keys=1, keys=text("a") + struct.pack("<IIQ", 9, 8, HUGE)), "truncated"),
    "long string": (header_of(num_keys=1, keys=text("a") + struct.pack("<IIQQ", 9, 8, 1, HUGE)), "truncated"),
    "no UTF-8": (header_of(num_keys=1, keys=text(b"\xff") + struct.pack("<IB", 0, 1)), "not UTF-8"),
    "five axes": (header_of(num_tensors=1, tensors=tensor(shape=(1,) * 5)), "5 dimensions"),
    "no axes": (header_of(num_tensors=1, tensors=tensor(shape=())), "0 dimensions"),
    "large": (header_of(num_tensors=1, tensors=tensor(shape=(HUGE, HUGE))), "has the shape"),
    "beyond": (header_of(num_tensors=1, tensors=tensor(offset=HUGE)) + bytes(99), "truncated: 'w' ends"),
    "cut off": (header_of(num_tensors=1, tensors=tensor(shape=(99,))) + bytes(99), "truncated: 'w' ends"),
    "misaligned": (header_of(num_tensors=1, tensors=tensor(offset=8)) + bytes(99), "no multiple of 32"),
    "tensor twice": (header_of(num_tensors=2, tensors=tensor() + tensor(offset=32)) + bytes(99), "twice"),
    "overlap": (header_of(num_tensors=2, tensors=tensor(shape=(9,)) + tensor("v", offset=32)) + bytes(99), "overlap"),
    "unknown type": (header_of(num_tensors=1, tensors=tensor(kind=77)) + bytes(99), "number 77"),
    "other type": (header_of(num_tensors=1, tensors=tensor(kind=19)) + bytes(99), "IQ1_S"),
    "part of a block": (
        header_of(num_tensors=1, tensors=tensor(shape=(33,), kind=8)) + bytes(99),
        "whole blocks of Q8",
    ),
    "alignment": (
        header_of(num_keys=1, keys=text("general.alignment") + struct.pack("<II", 4, 48)),
        "not a power of two",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_named(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    assert message in fails(file)


def test_every_truncation_is_told(tmp_path: Path) -> None:
    content = written(tmp_path / "m.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    for size in range(0, len(content) - 32, 7):  # the last bytes may be padding
        file.write_bytes(content[:size])
        fails(file)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert "cannot be read" in fails(tmp_path / "absent.gguf")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("valid") / "m.gguf").read_bytes()


@settings(max_examples=4 * settings().max_examples, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_gives_a_header_of_the_file_s_own_bytes_or_an_error(
    tmp_path: Path, valid: bytes, data: st.DataObject
) -> None:
    content = bytearray(valid)
    for at in data.draw(st.lists(st.integers(0, 900), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    file = tmp_path / "damaged.gguf"
    file.write_bytes(content)
    try:
        header = read_header(file)
    except WeightError:
        return
    for at in header.tensors.values():
        assert 0 <= at.offset <= at.offset + at.nbytes <= len(content)
