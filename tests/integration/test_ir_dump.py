"""MODULAR_DEBUG=ir-output-dir=DIR: every stage on a cold start, and on a warm one those that an artifact holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GRAPHS = ["new_pages", "sample_full_r1", "sample_greedy_r1", "sample_logprobs_r1", "step_t1_r1", "step_t2_r1"]
_CHILD = "import sys; from max.cli.main import run; print(run(sys.argv[1:]), 'jax' in sys.modules, file=sys.stderr)"


@pytest.fixture(scope="module")
def cold(run, model: Path, small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of a cold start; its cache lies beside it."""
    folder = tmp_path_factory.mktemp("ir")
    place = ("--model", str(model), "--cache-dir", str(folder / "cache"), *small)
    done = run("warm-cache", *place, environ={"MODULAR_DEBUG": f"ir-output-dir={folder / 'cold'}"})
    assert done.code == 0 and done.errors[0] == f"writing every stage of the IR to {folder / 'cold'}"
    return folder / "cold"


def stages(folder: Path) -> dict[str, set[str]]:
    """Stage number -> the names that it was written for."""
    found: dict[str, set[str]] = {}
    for file in folder.iterdir():
        if file.name != "index.json":
            name, stage = file.name.split(".")[:2]
            found.setdefault(stage, set()).add(name)
    return found


def test_a_cold_start_writes_every_stage(cold: Path, filled_cache: Path) -> None:
    found = stages(cold)
    assert sorted(found) == list("123456")
    assert found["1"] == found["2"] == set(GRAPHS) and len(found["3"]) == 1
    executables = found["5"]
    assert found["4"] == found["6"] == executables and len(executables) > 4
    index = json.loads((cold / "index.json").read_text())
    assert [entry["file"] for entry in index] == sorted(
        file.name for file in cold.iterdir() if file.name != "index.json"
    )
    assert all((cold / entry["file"]).stat().st_size == entry["bytes"] > 0 for entry in index)
    assert all(entry["file"].startswith(f"{entry['graph']}.{entry['stage']}") for entry in index)


def test_the_stages_are_what_they_are_called(cold: Path) -> None:
    assert "lambda" in (cold / "step_t1_r1.1.jaxpr").read_text()
    assert "stablehlo." in (cold / "step_t1_r1.2.stablehlo.mlir").read_text()
    (module,) = (file for file in cold.iterdir() if file.name.split(".")[1] == "3")
    text = module.read_text()
    assert all(f"@{graph}" in text for graph in GRAPHS)
    (executable,) = stages(cold)["5"] & {"sample_greedy_r1"}
    assert (cold / f"{executable}.4.hlo").read_text().startswith("HloModule")
    assert "HloModule" in (cold / f"{executable}.5.optimized.hlo").read_text()


def test_a_dump_changes_nothing_that_is_kept(call, cold: Path, model: Path, small, generate) -> None:
    place = (
        "--model",
        str(model),
        "--cache-dir",
        str(cold.parent / "cache"),
        *small,
        "--prompt",
        "hello",
        "--seed",
        "1",
    )
    done = json.loads(call("generate", *place, "--json").out)
    assert (done["source"], done["text"] + "\n") == ("bound", generate().out)


def test_a_warm_start_writes_the_first_three(
    cold: Path, model: Path, small, filled_cache: Path, tmp_path: Path
) -> None:
    place = ["generate", "--model", str(model), "--cache-dir", str(filled_cache), *small, "--prompt", "hello"]
    warm = tmp_path / "new" / "warm"
    environ = {**os.environ, "MODULAR_DEBUG": f"ir-output-dir={warm}"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _CHILD, *place],
        env=environ, cwd="/", capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "0 False"
    found, expected = stages(warm), stages(cold)
    assert found == {stage: expected[stage] for stage in "123"}
    for graph in GRAPHS:
        assert (warm / f"{graph}.1.jaxpr").read_text() == (cold / f"{graph}.1.jaxpr").read_text()
        assert f"@{graph}" in (warm / f"{graph}.2.stablehlo.mlir").read_text()
    index = json.loads((warm / "index.json").read_text())
    assert all((warm / entry["file"]).stat().st_size == entry["bytes"] for entry in index)


@pytest.mark.parametrize("state", ["warm", "cold"])
def test_a_folder_that_cannot_be_written_is_two_lines(
    call, model: Path, small, filled_cache: Path, tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODULAR_DEBUG", f"ir-output-dir={tmp_path / 'file' / 'ir'}")
    cache = filled_cache if state == "warm" else tmp_path / "cache"
    done = call("generate", "--model", str(model), "--cache-dir", str(cache), *small, "--prompt", "hello")
    assert (done.code, done.out) == (2, "")
    said, *rest, error, hint = done.errors
    assert said.startswith("writing every stage of the IR to ") and [line.split(":")[0] for line in rest] in (
        [],
        ["trace"],
    )
    assert error.startswith("error: ") and "cannot be written to" in error
    assert hint == "hint: Give another ir-output-dir."


def test_the_configuration_file_asks_for_a_dump_too(
    call, model: Path, small, filled_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modular.cfg").write_text(f"[max-debug]\nir-output-dir = {tmp_path / 'ir'}\n")
    monkeypatch.setenv("MODULAR_HOME", str(tmp_path))
    assert call("warm-cache", "--model", str(model), "--cache-dir", str(filled_cache), *small).code == 0
    assert sorted(stages(tmp_path / "ir")) == list("123")
