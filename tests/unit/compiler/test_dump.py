"""Dumps hold every stage of every graph, and are asked for in three ways."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from max import ConfigError
from max.cache import mef
from max.compiler import Graph, Module, Target, TensorType
from max.compiler.artifact import Options, compile_module
from max.compiler.dump import Dump, dump_folder
from max.compiler.stored_stages import dump_stored_stages
from max.runtime.session import InferenceSession

F8 = TensorType("float32", (8,))


@jax.jit
def halve(x: jax.Array) -> jax.Array:
    return jnp.sin(x) / 2


def make_module() -> Module:
    module = Module("pair")
    Graph("calls", lambda x: halve(halve(x)), [F8], module=module)
    Graph("whole", lambda x: halve(x) + 1, [F8], module=module)
    return module


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, mef.Mef]:
    folder, buffer = tmp_path_factory.mktemp("dump") / "new", io.BytesIO()
    compile_module(make_module(), Target.parse("cpu"), mef.MefWriter(buffer), Options(dump=Dump(folder)))
    return folder, mef.Mef.from_bytes(buffer.getvalue())


def test_every_stage_is_there(dumped):
    names = {path.name for path in dumped[0].iterdir()}
    graphs = {f"{name}.{stage}" for name in ("calls", "whole") for stage in ("1.jaxpr", "2.stablehlo.mlir")}
    code = {f"{name}.{stage}" for name in ("halve", "whole") for stage in ("4.hlo", "5.optimized.hlo", "6.ll")}
    assembly = {"halve.6.asm", "whole.6.asm"} if shutil.which("objdump") or shutil.which("llvm-objdump") else set()
    assert names == graphs | code | assembly | {"pair.3.mlir", "index.json"}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("calls.1.jaxpr", "lambda ;"),
        ("calls.2.stablehlo.mlir", "func.func public @main"),
        ("pair.3.mlir", "func.func private @halve"),
        ("pair.3.mlir", "func.func public @whole"),
        ("halve.4.hlo", "HloModule"),
        ("whole.5.optimized.hlo", "HloModule"),
        ("halve.6.ll", "; kernel "),
        ("halve.6.ll", "define "),
    ],
)
def test_stages_are_what_they_say(dumped, file, words):
    assert words in (dumped[0] / file).read_text()


def test_what_is_kept_knows_nothing_of_the_dump(dumped):
    """XLA writes the folder of its dumps into the code, and makes it again wherever that is loaded."""
    codes = [dumped[1].read(section) for section in dumped[1].sections() if section.kind == mef.NATIVE]
    assert len(codes) == 2
    assert not [code for code in codes if b"xla-dump" in code or tempfile.gettempdir().encode() in code]


def test_index_lists_every_file_with_its_size(dumped):
    folder, _ = dumped
    entries = json.loads((folder / "index.json").read_text())
    assert {entry["file"]: entry["bytes"] for entry in entries} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != "index.json"
    }
    assert entries == sorted(entries, key=lambda entry: entry["file"])
    for entry in entries:
        assert entry["file"] == f"{entry['graph']}.{entry['stage']}"
    seconds = {entry["stage"]: entry["seconds"] for entry in entries}
    assert seconds["1.jaxpr"] > 0
    assert seconds["5.optimized.hlo"] > 0


def test_a_warm_start_dumps_the_first_three_stages_from_the_artifact(dumped, tmp_path):
    dump_stored_stages(dumped[1], Dump(tmp_path))
    for name in ("calls.1.jaxpr", "whole.1.jaxpr", "pair.3.mlir"):
        assert (tmp_path / name).read_text().strip()
    assert (tmp_path / "calls.1.jaxpr").read_text() == (dumped[0] / "calls.1.jaxpr").read_text()
    for name in ("calls", "whole"):
        assert "func.func public @main" in (tmp_path / f"{name}.2.stablehlo.mlir").read_text()


def test_no_folder_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dump = Dump()
    assert not dump.enabled
    dump.write("g", "1.jaxpr", "text")
    with dump.code("g") as folder:
        assert folder is None
    dump.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"g.1.jaxpr cannot be written to .*file") as caught:
        Dump(tmp_path / "file").write("g", "1.jaxpr", "text")
    assert "ir-output-dir" in caught.value.hint


# --- asking for one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "folder", "unknown"),
    [
        ("", None, []),
        ("ir-output-dir=/tmp/x", "/tmp/x", []),
        ("ir-output-dir=a=b,", "a=b", []),
        ("ir-output-dir=", None, []),
        ("trace=1,ir-output-dir=/tmp/x,verbose", "/tmp/x", ["trace", "verbose"]),
        ("ir_output_dir=/tmp/x", None, ["ir_output_dir"]),
    ],
)
def test_environment(value, folder, unknown, caplog):
    found = dump_folder({"MODULAR_DEBUG": value})
    assert found == (None if folder is None else Path(folder))
    assert [record.getMessage() for record in caplog.records] == [
        f"MODULAR_DEBUG: unknown option {name!r}; ignoring" for name in unknown
    ]
    dump_folder({"MODULAR_DEBUG": value})
    assert len(caplog.records) == len(unknown), "each is said once"


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("[max-debug]\nir-output-dir = /tmp/y\n", "/tmp/y"),
        ("[max-debug]\nir-output-dir = /tmp/100%\n", "/tmp/100%"),
        ("[max-debug]\n", None),
        ("[other]\nir-output-dir = /tmp/y\n", None),
    ],
)
def test_modular_cfg(text, folder, tmp_path):
    (tmp_path / "modular.cfg").write_text(text)
    found = dump_folder({"MODULAR_HOME": str(tmp_path)})
    assert found == (None if folder is None else Path(folder))
    assert dump_folder({"MODULAR_HOME": str(tmp_path), "MODULAR_DEBUG": "ir-output-dir=/z"}) == Path("/z")
    assert dump_folder({"MODULAR_HOME": str(tmp_path / "absent")}) is None


@pytest.mark.parametrize("content", [b"ir-output-dir = no section\n", b"[max-debug]\nir-output-dir = \xff\n"])
def test_a_broken_modular_cfg_is_a_warning(content, tmp_path, caplog):
    (tmp_path / "modular.cfg").write_bytes(content)
    assert dump_folder({"MODULAR_HOME": str(tmp_path)}) is None
    assert "cannot read" in caplog.text


def test_a_session_dumps_where_it_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MODULAR_DEBUG", f"ir-output-dir={tmp_path / 'environment'}")
    session = InferenceSession()
    assert session.debug.ir_output_dir == tmp_path / "environment"
    session.debug.ir_output_dir = str(tmp_path / "chosen")
    with caplog.at_level(logging.INFO):
        session.compile(Graph("one", lambda x: x + 1, [F8]))
    assert (tmp_path / "chosen" / "one.5.optimized.hlo").is_file()
    assert not (tmp_path / "environment").exists()
    assert str(tmp_path / "chosen") in caplog.text
