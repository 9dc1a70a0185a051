"""The commands on GGUF files: answers as from the folder, warm starts, and errors before anything is compiled."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from max.bench.gguf_export import write_gguf
from max.compiler import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not built: no C++ compiler")


@pytest.fixture(scope="module")
def file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as one float32 file, in a folder of its own."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(model, path)
    return path


@pytest.mark.parametrize("form", ["file", "folder", "weight path"])
def test_a_file_answers_as_its_folder_does(call, generate, file: Path, model: Path, cache: Path, small, form) -> None:
    model_arguments = {
        "file": ["--model", str(file)],
        "folder": ["--model", str(file.parent)],
        "weight path": ["--model", str(model), "--weight-path", str(file)],
    }[form]
    place = (*model_arguments, "--cache-dir", str(cache), *small, "--prompt", "hello", "--seed", "1", "--json")
    first, again = (json.loads(call("generate", *place).out) for _ in range(2))
    assert first["text"] + "\n" == generate().out == again["text"] + "\n"
    assert (first["source"], again["source"]) == ("same shape", "bound")


_CHILD = """
import sys
from max.cli.main import run
code = run(sys.argv[1:])
unwanted = ("jax", "flax", "transformers", "gguf", "requests")
print(code, sorted(name for name in sys.modules if name in unwanted or name.startswith("max.models.")), file=sys.stderr)
"""


def test_a_warm_start_from_a_file_loads_no_more_than_one_from_a_folder(call, file: Path, cache: Path, small) -> None:
    place = ("--model", str(file), "--cache-dir", str(cache), *small)
    assert call("warm-cache", *place).code == 0
    command = [sys.executable, "-W", "error", "-c", _CHILD, "generate", *place, "--prompt", "hello", "--seed", "1"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr.splitlines()[-1] == "0 []"


def test_a_file_changed_in_place_is_another(call, file: Path, cache: Path, tmp_path: Path, small) -> None:
    copied = shutil.copy(file, tmp_path / "model.gguf")
    place = ("--model", str(copied), "--cache-dir", str(cache), *small, "--prompt", "hello", "--seed", "1", "--json")
    before = json.loads(call("generate", *place).out)
    content = bytearray(Path(copied).read_bytes())
    content[-4000:] = content[-8000:-4000]
    Path(copied).write_bytes(content)
    after = json.loads(call("generate", *place).out)
    assert after["source"] == "same shape" and after["text"] != before["text"]


def test_encodings_are_converted_with_a_word(call, model: Path, cache: Path, tmp_path: Path, small, caplog) -> None:
    write_gguf(model, tmp_path / "m.gguf", "q4_0")
    place = ("--model", str(tmp_path / "m.gguf"), "--cache-dir", str(cache), *small)
    assert call("warm-cache", *place, "--quantization-encoding", "float32").code == 0
    assert "quantized weights are converted: from=q4_0 to=float32" in caplog.text
    caplog.clear()
    assert call("warm-cache", *place, "--quantization-encoding", "q4_k").code == 0
    assert "matrices are packed as q8_0" in caplog.text  # widths of 64 and 96


# --- mistakes


def damaged(
    source: Path, path: Path, change: Callable[[gguf.GGUFWriter, str, np.ndarray], None], drop: str = ""
) -> Path:
    """The file written anew with each tensor changed, and without the metadata whose names start with `drop`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or (drop and key.startswith(drop)):
            continue
        writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        change(writer, tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(writer: gguf.GGUFWriter, name: str, data: np.ndarray) -> None:
    writer.add_tensor(name, data)


def without_norm(writer: gguf.GGUFWriter, name: str, data: np.ndarray) -> None:
    if name != "output_norm.weight":
        same(writer, name, data)


def with_another(writer: gguf.GGUFWriter, name: str, data: np.ndarray) -> None:
    same(writer, name, data)
    if name == "output_norm.weight":
        same(writer, "adapter.weight", data)


def narrower(writer: gguf.GGUFWriter, name: str, data: np.ndarray) -> None:
    same(writer, name, data[:, :-1] if "ffn_up" in name else data)


def wide_blocks(writer: gguf.GGUFWriter, name: str, data: np.ndarray) -> None:
    if name != "output.weight":
        same(writer, name, data)
        return
    writer.add_tensor(name, np.zeros((640, 64 // 32 * 22), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q5_0)


def cut(source: Path, path: Path) -> Path:
    shutil.copy(source, path)
    os.truncate(path, source.stat().st_size // 2)
    return path


def empty(source: Path, path: Path) -> Path:
    path.touch()
    return path


def of_many(source: Path, path: Path) -> Path:
    path.write_bytes(source.read_bytes()[:8] + struct.pack("<QQ", 1 << 60, 1) + source.read_bytes()[24:])
    return path


MISTAKES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "absent": (lambda source, path: path, "there is no file"),
    "empty": (empty, "is no GGUF file"),
    "cut off": (cut, "is truncated"),
    "2^60 tensors": (of_many, "claims 1152921504606846976 tensors"),
    "tensor missing": (lambda source, path: damaged(source, path, without_norm), "1 missing (model.norm.weight)"),
    "tensor too many": (lambda source, path: damaged(source, path, with_another), "1 unexpected (adapter.weight)"),
    "tensor of another shape": (lambda source, path: damaged(source, path, narrower), "2 misshapen"),
    "type": (lambda source, path: damaged(source, path, wide_blocks), "of the type Q5_0"),
    "no tokenizer": (lambda source, path: damaged(source, path, same, "tokenizer."), "tokenizer.ggml.model is missing"),
    "no settings": (lambda source, path: damaged(source, path, same, "llama.block"), "block_count is missing"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_two_lines_before_anything_is_compiled(call, file: Path, tmp_path: Path, small, name) -> None:
    make, message = MISTAKES[name]
    model = make(file, tmp_path / "model.gguf")
    cache = tmp_path / "cache"
    done = call("generate", "--model", str(model), "--cache-dir", str(cache), *small, "--prompt", "hello")
    assert (done.code, len(done.errors)) == (2, 2), done.err
    assert message in done.errors[0] and not list(cache.glob("blobs/*/*"))
