"""A warm start does without jax and models/, and what decides an artifact decides whether there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import max
from max.bench import random_model

_CHILD = """
import sys
from max.cli.main import run
from max.compiler.counters import COUNTERS
code = run(sys.argv[1:])
unwanted = ("jax", "flax", "transformers", "orbax", "fastapi", "max.models", "max.bench", "max.compiler.artifact")
found = sorted(name for name in sys.modules if name in unwanted or name.startswith("max.models."))
print(code, found, f"traced={COUNTERS.traced} compiled={COUNTERS.compiled}", file=sys.stderr)
"""
WARM = "0 [] traced=0 compiled=0"
"""The last line of a child that was warm."""


def child(*arguments: str, environ: dict[str, str] | None = None, cwd: Path | str = "/") -> tuple[str, list[str]]:
    """Runs `max` in a new process; returns stdout and stderr, at whose end are the code and the unwanted modules."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _CHILD, *arguments],
        env={**os.environ, **(environ or {})}, cwd=cwd, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr.splitlines()


@pytest.fixture
def place(model: Path, filled_cache: Path, small) -> tuple[str, ...]:
    return ("--model", str(model), "--cache-dir", str(filled_cache), *small)


def test_a_warm_start_imports_neither_jax_nor_models(place) -> None:
    out, err = child("generate", *place, "--prompt", "hello", "--seed", "1")
    assert err[-1] == WARM and len(out) > 40


def test_a_process_that_has_loaded_can_compile(place) -> None:
    """XLA initializes itself for each of the two, which must not happen in two threads at once."""
    script = "import sys; from max.cli.main import run; sys.exit(run(sys.argv[1:]) or run([*sys.argv[1:], *COLD]))"
    script = script.replace("COLD", repr(["--no-use-subgraphs", "--cache-policy", "off"]))
    child = [sys.executable, "-c", script, "generate", *place, "--prompt", "hello", "--temperature", "0", "--json"]
    done = subprocess.run(child, cwd="/", capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    warm, cold = (json.loads(line) for line in done.stdout.split("\n") if line)
    assert (warm["source"], cold["source"]) == ("bound", "compiled") and warm["text"] == cold["text"]


def test_a_cached_warm_cache_imports_neither(place) -> None:
    out, err = child("warm-cache", *place)
    assert err == [WARM] and "all was there already" in out


def test_cold_and_warm_give_the_same_text(run, place, generate, tmp_path: Path) -> None:
    cold = run("generate", *place, "--prompt", "hello", "--seed", "1", "--cache-dir", str(tmp_path / "cache"))
    assert "(compiled)" in cold.errors[-1]
    assert cold.out == generate().out


def test_a_relative_path_is_the_same_checkpoint(place, model: Path) -> None:
    out, err = child("warm-cache", *place, "--model", model.name, "--json", cwd=model.parent)
    assert err == [WARM] and json.loads(out)["cached"] is True


def test_two_checkpoints_of_one_shape_share_an_artifact(call, generate, twin: Path, cache: Path, small) -> None:
    place = ("--model", str(twin), "--cache-dir", str(cache), *small, "--prompt", "hello", "--seed", "1", "--json")
    found = json.loads(call("generate", *place).out)
    assert found["source"] == "same shape" and found["text"] + "\n" != generate().out
    assert len(list((cache / "blobs").glob("*/*"))) == 1 and len(list((cache / "prepared").glob("*/*"))) == 2
    again = json.loads(call("generate", *place).out)
    assert (again["source"], again["text"]) == ("bound", found["text"])


def test_a_checkpoint_changed_in_place_is_another(call, small, model: Path, cache: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model, tmp_path / "model")
    place = ("--model", str(copied), "--cache-dir", str(cache), *small, "--prompt", "hello", "--seed", "1", "--json")
    before = json.loads(call("generate", *place).out)["text"]
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-4000:] = weights[-8000:-4000]
    (copied / "model.safetensors").write_bytes(weights)
    changed = json.loads(call("generate", *place).out)
    assert (changed["text"] != before, changed["source"]) == (True, "same shape")


def test_a_changed_tokenizer_is_read_anew(call, small, model: Path, cache: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model, tmp_path / "model")
    place = ("--model", str(copied), "--cache-dir", str(cache), *small, "--prompt", "hello", "--json")
    assert json.loads(call("generate", *place).out)["prompt_tokens"] == 19
    config = json.loads((copied / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content }}"
    (copied / "tokenizer_config.json").write_text(json.dumps(config))
    changed = json.loads(call("generate", *place).out)
    assert (changed["prompt_tokens"], changed["source"]) == (3, "same shape")


MISSES: list[tuple[list[str], str]] = [
    (["--max-length", "32"], "max_length: 32 wanted, 64 stored"),
    (["--max-batch-input-tokens", "4"], "limits.token_buckets: [1, 2, 4] wanted, [1, 2] stored"),
    (["--no-use-subgraphs"], "use_subgraphs: False wanted, True stored"),
]


@pytest.mark.parametrize(("change", "named"), MISSES, ids=lambda each: each[0] if isinstance(each, list) else "")
def test_a_setting_that_is_compiled_in_is_named_on_a_miss(call, place, change: list[str], named: str) -> None:
    for command in (["generate", "--prompt", "hello"], ["warm-cache"]):
        done = call(*command, *place, *change, "--cache-policy", "require")
        assert (done.code, done.out) == (2, "")
        error, hint = done.errors
        assert error.startswith("error: no compiled artifact for these settings in ") and named in hint


def test_other_flags_of_xla_are_another_artifact(place) -> None:
    _, err = child(
        "warm-cache", *place, "--cache-policy", "require", environ={"XLA_FLAGS": "--xla_cpu_use_xnnpack=false"}
    )
    assert "xla_flags: --xla_cpu_use_xnnpack=false wanted" in err[1] and err[-1].startswith("2 ")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package to change; its parent goes on PYTHONPATH."""
    root = Path(max.__file__).parent
    copied = tmp_path_factory.mktemp("changed") / "max"
    for name in ("bench", "cache", "cli", "compiler", "models", "runtime", "serve"):
        shutil.copytree(root / name, copied / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(root / name, copied / name)
    return copied


@pytest.mark.parametrize("changed", ["models/llama.py", "compiler/segments.py"])
def test_changed_sources_are_another_artifact(package: Path, place, changed: str) -> None:
    arguments = ("warm-cache", *place, "--cache-policy", "require")
    environ = {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    assert child(*arguments, environ=environ)[1] == [WARM]  # the place of the sources does not count
    source = package / changed
    original = source.read_text()
    source.write_text(original + "\n# changed\n")
    _, err = child(*arguments, environ=environ)
    source.write_text(original)
    assert err[-1].startswith("2 ") and "sources: " in err[-2]


def test_one_graph_per_step_gives_the_same_greedy_text(call, generate, place, tmp_path: Path) -> None:
    expected = generate("--temperature", "0").out
    whole = ("--no-use-subgraphs", "--cache-dir", str(tmp_path / "cache"))
    done = call("generate", *place, *whole, "--prompt", "hello", "--temperature", "0")
    assert done.out == expected and "(compiled)" in done.errors[-1]


@pytest.fixture
def older(cache: Path) -> Callable[[], set[str]]:
    """The names of artifacts and weights in a cache."""
    return lambda: {path.name for name in ("blobs", "prepared") for path in (cache / name).glob("*/*")}


def test_redo_makes_all_of_it_again(call, place, generate, cache: Path, older) -> None:
    before = {path: path.stat().st_ino for path in cache.rglob("*") if path.is_file()}
    arguments = ("generate", *place, "--cache-dir", str(cache), "--prompt", "hello", "--seed", "1", "--json")
    done = json.loads(call(*arguments, "--cache-policy", "redo").out)
    assert done["source"] == "compiled" and done["text"] + "\n" == generate().out
    after = {path: path.stat().st_ino for path in cache.rglob("*") if path.is_file()}
    for name in ("index", "bindings", "prepared"):
        kept = [path for path in before if path.relative_to(cache).parts[0] == name and before[path] == after.get(path)]
        assert kept == []
    assert json.loads(call(*arguments).out)["source"] == "bound"


@pytest.mark.parametrize("policy", ["off", "readonly"])
def test_a_policy_that_fills_nothing(call, place, generate, policy: str, tmp_path: Path, caplog) -> None:
    arguments = ("--cache-dir", str(tmp_path / "cache"), "--cache-policy", policy)
    done = call("generate", *place, *arguments, "--prompt", "hello", "--seed", "1")
    assert (done.code, done.out) == (0, generate().out)
    assert not (tmp_path / "cache").exists() and [each for each in caplog.records if each.levelname == "WARNING"] == []


@pytest.mark.parametrize("policy", ["readonly", "require"])
def test_a_policy_that_reads_is_warm(call, place, generate, policy: str) -> None:
    done = call("generate", *place, "--cache-policy", policy, "--prompt", "hello", "--seed", "1", "--json")
    assert json.loads(done.out)["source"] == "bound"


def test_nothing_but_reading_happens_in_a_warm_cache(generate, filled_cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in filled_cache.rglob("*") if path.is_file()}
    generate()
    assert before == {path: path.stat().st_mtime_ns for path in filled_cache.rglob("*") if path.is_file()}
    assert random_model.SIZES.keys() == {"5m", "349m"}
