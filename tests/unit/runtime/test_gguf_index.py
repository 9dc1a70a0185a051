"""The index of a GGUF header gives what the header gives, and is never believed about another file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from max import WeightError
from max.cache.config import CacheConfig
from max.runtime import gguf_file, gguf_index
from max.runtime.gguf_index import read_header

TOKENS = [f"token {number} é" for number in range(9000)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A header longer than what its index is kept under, with arrays short and long."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_name("a name")
    writer.add_array("tokens", TOKENS)
    writer.add_array("scores", [float(number) for number in range(9000)])
    writer.add_array("layers", [1, 2, 3])
    writer.add_bool("flag", True)
    writer.add_float32("nothing", float("inf"))
    writer.add_tensor("w", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(cache_dir=tmp_path / "cache")


def values(header: gguf_file.Header) -> dict[str, Any]:
    found = {key: list(value) if isinstance(value, list | gguf_file.LongArray) else value
             for key, value in header.metadata.items()}  # fmt: skip
    return {**vars(header), "metadata": found, "order": list(header.metadata)}


def refuse(_file: Path) -> None:
    raise AssertionError("the header was read again")


def test_the_second_reading_gives_what_the_first_gave(file, cache, monkeypatch):
    wanted = values(gguf_file.read_header(file))
    assert wanted["metadata"]["tokens"] == TOKENS
    assert values(read_header(file, cache)) == wanted
    monkeypatch.setattr(gguf_file, "read_header", refuse)
    assert values(read_header(file, cache)) == wanted
    (again := file.with_name("copy.gguf")).write_bytes(file.read_bytes())
    assert read_header(again, cache).tensors["w"].file == again
    with pytest.raises(AssertionError, match="read again"):
        read_header(file, CacheConfig(cache_dir=cache.cache_dir, cache_policy="redo"))


@pytest.mark.parametrize("where", ["tokens", "name"])
def test_another_header_of_the_same_size_is_read_anew(file, cache, where):
    read_header(file, cache)
    content = file.read_bytes()
    old, new = (b"token 8999", b"token 9998") if where == "tokens" else (b"a name", b"A NAME")
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))
    assert values(read_header(file, cache)) == values(gguf_file.read_header(file))


def test_a_file_that_was_cut_is_damaged_whatever_is_kept(file, cache):
    read_header(file, cache)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightError, match="truncated"):
        read_header(file, cache)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"{", b'{"nbytes": "x", "sha256": ""}', b"\xff"])
def test_an_index_that_cannot_be_read_is_made_again(file, cache, content, caplog):
    wanted = values(read_header(file, cache))
    (path,) = (cache.folder / "derived").iterdir()
    sound = path.read_bytes()
    path.write_bytes(hashlib.sha256(path.name.encode() + content).digest() + content)
    assert values(read_header(file, cache)) == wanted
    assert path.read_bytes() == sound
    assert "a kept header cannot be read" in caplog.text


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path, cache):
    with pytest.raises(WeightError, match="cannot be read"):
        read_header(tmp_path / "none.gguf", cache)


def test_without_a_cache_nothing_is_kept(file, monkeypatch):
    monkeypatch.setattr(gguf_index, "Store", refuse)
    assert values(read_header(file)) == values(gguf_file.read_header(file))
