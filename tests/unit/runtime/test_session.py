"""Sessions that export what they compile, and sessions that take it from there and compile nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from max import ConfigError, MaxError, MissingArtifactError
from max.cache.exported import read_manifest
from max.compiler import Graph, Module, TensorType
from max.compiler.counters import COUNTERS
from max.runtime.session import InferenceSession

F3 = TensorType("float32", (3,))
X = np.array([1, 2, 3], np.float32)


def double(shape: TensorType = F3) -> Graph:
    return Graph("double", lambda x: x * 2, {"x": shape})


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder with the artifact of `double`."""
    folder = tmp_path / "mefs"
    model = InferenceSession(export_mefs=folder).load(double())
    assert np.asarray(model(X)[0]).tolist() == [2, 4, 6]
    return folder


def test_the_manifest_says_what_there_is(exported: Path) -> None:
    (row,) = read_manifest(exported).artifacts
    assert row.name == "double" and row.target == "cpu:native" and (exported / row.file).is_file()
    assert row.graphs["double"]["inputs"] == [{"name": "x", "role": "input", "dtype": "float32", "shape": [3]}]
    assert [(each["dtype"], each["shape"]) for each in row.graphs["double"]["outputs"]] == [("float32", [3])]


@pytest.mark.parametrize("as_list", [True, False])
def test_nothing_is_compiled_where_it_is_there(exported: Path, tmp_path: Path, as_list: bool) -> None:
    (tmp_path / "other").mkdir()
    InferenceSession(export_mefs=tmp_path / "other").compile(Graph("triple", lambda x: x * 3, {"x": F3}))
    named = [tmp_path / "other", exported] if as_list else str(exported)
    before = COUNTERS.compiled
    model = InferenceSession(precompiled_mefs=named).load(double())
    assert COUNTERS.compiled == before
    assert np.asarray(model(X)[0]).tolist() == [2, 4, 6]


IN_ANOTHER_PROCESS = """
import sys
from max.compiler import Graph, TensorType
from max.compiler.counters import COUNTERS
from max.runtime.session import InferenceSession
session = InferenceSession(precompiled_mefs=sys.argv[1])
session.load(Graph("double", lambda x: x * 2, {"x": TensorType("float32", (3,))})).load()
print(COUNTERS.compiled, COUNTERS.loaded)
"""


def test_another_process_finds_it(exported: Path) -> None:
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(exported)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0 1\n"


def test_what_is_not_there_is_named(exported: Path, tmp_path: Path) -> None:
    session = InferenceSession(precompiled_mefs=exported)
    with pytest.raises(MissingArtifactError, match=r"graph double; the nearest one differs in graphs\.double") as error:
        session.compile(double(TensorType("float32", (4,))))
    assert "graph double" in error.value.hint
    with pytest.raises(MissingArtifactError, match="graph double; the nearest one differs in stablehlo"):
        session.compile(Graph("double", lambda x: x + x, {"x": F3}))
    module = Module("both")
    for name in ("first", "second"):
        Graph(name, lambda x: x, {"x": F3}, module=module)
    with pytest.raises(MissingArtifactError, match="graphs first, second"):
        session.compile(module)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingArtifactError, match="holds no artifacts, and so none for graph double"):
        InferenceSession(precompiled_mefs=tmp_path / "empty").compile(double())


@pytest.mark.parametrize("trouble", ["damaged", "gone", "open to all", "no manifest"])
def test_what_cannot_be_trusted_is_not_run(exported: Path, trouble: str) -> None:
    (path,) = exported.glob("*.mef")
    match trouble:
        case "damaged":
            data = bytearray(path.read_bytes())
            data[-len(data) // 2] ^= 1
            path.write_bytes(data)
        case "gone":
            path.unlink()
        case "open to all":
            exported.chmod(0o777)
        case "no manifest":
            (exported / "manifest.json").write_bytes(b"{")
    with pytest.raises(ConfigError) as error:
        InferenceSession(precompiled_mefs=exported).compile(double())
    assert error.value.hint and not isinstance(error.value, MissingArtifactError)


def test_an_export_of_what_is_precompiled_is_a_copy(exported: Path, tmp_path: Path) -> None:
    InferenceSession(precompiled_mefs=exported, export_mefs=tmp_path / "copy").compile(double())
    (path,) = exported.glob("*.mef")
    assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    assert read_manifest(tmp_path / "copy") == read_manifest(exported)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MaxError, match="cannot be exported"):
        InferenceSession(export_mefs=tmp_path / "file").compile(double())
