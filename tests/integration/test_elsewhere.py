"""Artifacts from elsewhere: exported, imported, compiled for less; each is tried once, and only once."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from max.cache import mef
from max.cache.catalog import entries
from max.cache.config import CacheConfig
from max.cache.exported import read_manifest
from max.cache.key import Key, make_key
from max.cache.mef import Mef, MefWriter
from max.cache.store import Store
from max.compiler.counters import COUNTERS
from max.runtime import preparation, trial


@pytest.fixture
def generate_in(call, model: Path, small) -> Callable[..., tuple[dict, str]]:
    """Runs `max generate --json`; returns the result and stderr."""

    def run(cache: Path, *arguments: str, code: int = 0) -> tuple[dict, str]:
        place = ("--model", str(model), "--cache-dir", str(cache), *small, "--prompt", "hello", "--seed", "1")
        done = call("generate", *place, "--json", *arguments)
        assert done.code == code, done.err
        return (json.loads(done.out) if code == 0 else {}), done.err

    return run


@pytest.fixture
def trials(monkeypatch) -> list[Path]:
    """The artifacts that were tried."""
    tried: list[Path] = []
    real = trial.try_artifact
    monkeypatch.setattr(trial, "try_artifact", lambda path: (tried.append(path), real(path))[1])
    return tried


@pytest.fixture
def nothing_compiles(monkeypatch) -> None:
    def compiles(*_: object) -> bytes:
        raise AssertionError("it was compiled")

    monkeypatch.setattr(preparation.Preparation, "_compile", compiles)


@pytest.fixture(scope="session")
def exported(run, model: Path, filled_cache: Path, small, tmp_path_factory) -> Path:
    """A folder that a warm start exported to."""
    folder = tmp_path_factory.mktemp("exported") / "mefs"
    place = ("--model", str(model), "--cache-dir", str(filled_cache), *small)
    assert run("warm-cache", *place, "--export-mefs", str(folder)).code == 0
    return folder


@pytest.fixture
def text(generate_in, filled_cache: Path) -> str:
    return generate_in(filled_cache)[0]["text"]


def test_precompiled_artifacts_take_the_place_of_compiling(
    generate_in, exported: Path, tmp_path: Path, text: str, trials, nothing_compiles
) -> None:
    (row,) = read_manifest(exported).artifacts
    assert {"step_t1_r1", "sample_greedy_r1"} <= row.graphs.keys()
    cache = tmp_path / "cache"
    first, _ = generate_in(cache, "--precompiled-mefs", str(exported))
    assert (first["text"], first["source"], len(trials)) == (text, "precompiled", 1)
    again, _ = generate_in(cache, "--precompiled-mefs", str(exported))
    assert (again["text"], again["source"], len(trials)) == (text, "bound", 1)
    assert not any((cache / "blobs").iterdir()), "the artifact stays where it is"


def test_precompiled_artifacts_of_other_settings_are_refused_by_name(generate_in, exported: Path, tmp_path) -> None:
    _, err = generate_in(tmp_path, "--precompiled-mefs", str(exported), "--max-length", "32", code=2)
    assert "differs in limits.max_length: 32 wanted, 64 stored" in err
    _, err = generate_in(tmp_path, "--precompiled-mefs", str(tmp_path / "nowhere"), code=2)
    assert "holds no artifacts" in err


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Writes an artifact with some sections changed, consistently hashed, as a compiler with a fault would."""
    sound = Mef.open(source)
    with MefWriter(target) as writer:
        for each in sound.sections():
            writer.add(each.kind, each.name, change(each.kind, sound.read(each)), target=each.target)
        writer.finish()


def wrong_probe(kind: str, data: bytes) -> bytes:
    if kind != mef.PROBE:
        return data
    probe = json.loads(data)
    for results in probe["results"].values():
        for result in results:
            result["norm"] += 1.0
    return json.dumps(probe).encode()


def no_code(kind: str, data: bytes) -> bytes:
    return b"no code" if kind == mef.NATIVE else data


@pytest.mark.parametrize(("change", "trouble"), [(wrong_probe, "gives other results"), (no_code, "cannot be loaded")])
def test_an_artifact_that_fails_its_trial_is_set_aside(
    generate_in, filled_cache: Path, tmp_path: Path, text: str, caplog, change, trouble: str
) -> None:
    cache = tmp_path / "cache"
    (entry,) = entries(Store.open(CacheConfig(cache_dir=filled_cache)))
    store = Store.open(CacheConfig(cache_dir=cache))
    source = filled_cache / "blobs" / entry.record.mef[:2] / entry.record.mef
    store.publish(Key(entry.record.key, entry.record.factors), lambda path: rewritten(source, path, change))
    found, _ = generate_in(cache)
    assert (found["text"], found["source"]) == (text, "compiled")
    assert "failed its trial on this machine" in caplog.text and trouble in caplog.text
    assert len(list((cache / "quarantine").iterdir())) == 2
    assert generate_in(cache)[0]["source"] == "bound"


def test_what_this_machine_has_compiled_is_not_tried(generate_in, filled_cache: Path, trials) -> None:
    assert generate_in(filled_cache)[0]["source"] == "bound" and trials == []


def test_an_imported_artifact_is_tried_once(
    call, generate_in, filled_cache: Path, tmp_path: Path, text: str, trials, nothing_compiles
) -> None:
    bundle, cache = str(tmp_path / "a.bundle"), tmp_path / "cache"
    assert call("cache", "export", bundle, "--cache-dir", str(filled_cache)).code == 0
    assert call("cache", "import", bundle, "--cache-dir", str(cache)).code == 0
    assert (generate_in(cache)[0]["text"], len(trials)) == (text, 1)
    assert (generate_in(cache)[0]["text"], len(trials)) == (text, 1)
    shutil.rmtree(cache / "verdicts")
    assert (generate_in(cache)[0]["text"], len(trials)) == (text, 2)


@pytest.mark.parametrize(
    ("program", "trouble"),
    [("kill -SEGV $$", "died of SIGSEGV"), ("exit 3", "ended with code 3"), ("echo nonsense", "ended with code 0")],
)
def test_a_crash_is_a_verdict(tmp_path: Path, monkeypatch, program: str, trouble: str) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    assert trouble in trial.try_artifact(tmp_path / "a.mef")


def test_an_artifact_compiled_for_less_serves(
    generate_in, call, model: Path, small, filled_cache: Path, tmp_path: Path, text: str, nothing_compiles
) -> None:
    """The same code under the key of a host with fewer instruction sets, as a build host with an older CPU has."""
    (entry,) = entries(Store.open(CacheConfig(cache_dir=filled_cache)))
    cache = tmp_path / "cache"
    store = Store.open(CacheConfig(cache_dir=cache))
    target = entry.record.factors["target"]
    older = {**target, "features": target["features"][1:], "arch": "x86-64-v3"}
    key = make_key({**entry.record.factors, "target": older})
    source = filled_cache / "blobs" / entry.record.mef[:2] / entry.record.mef
    assert store.publish(key, source.read_bytes())
    found, _ = generate_in(cache)
    assert (found["text"], found["source"]) == (text, "compatible")
    assert generate_in(cache)[0]["source"] == "bound"
    place = ("--model", str(model), "--cache-dir", str(cache), *small)
    assert "hit, compiled for fewer instruction sets" in call("cache", "explain", *place).out
    newer = {**target, "features": [*target["features"], "of_a_later_cpu"]}
    (cache / "index" / f"{key.digest}.json").unlink()
    assert store.publish(make_key({**entry.record.factors, "target": newer}), source.read_bytes())
    assert "artifact  miss" in call("cache", "explain", *place).out


def test_every_file_of_a_start_is_private(filled_cache: Path) -> None:
    for path in (filled_cache, *filled_cache.iterdir()):
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert os.stat(filled_cache).st_uid == os.geteuid()


@pytest.mark.parametrize("factor", ["toolchain", "xla_flags", "target"])
def test_the_stored_ir_is_compiled_where_the_code_does_not_serve(
    generate_in, filled_cache: Path, tmp_path: Path, text: str, monkeypatch, factor: str
) -> None:
    """Nothing is traced when another compiler, or code for another CPU, is all that tells two artifacts apart."""
    (entry,) = entries(Store.open(CacheConfig(cache_dir=filled_cache)))
    cache, factors = tmp_path / "cache", entry.record.factors
    other = {
        "toolchain": {**factors["toolchain"], "jaxlib": "0.0.1"},
        "xla_flags": "--xla_other",
        "target": {**factors["target"], "features": [*factors["target"]["features"], "of_another_cpu"]},
    }
    key = make_key({**factors, factor: other[factor]})
    source = filled_cache / "blobs" / entry.record.mef[:2] / entry.record.mef
    assert Store.open(CacheConfig(cache_dir=cache)).publish(key, source.read_bytes())
    traced = COUNTERS.traced
    found, _ = generate_in(cache)
    assert (found["text"], found["source"]) == (text, "compiled from stored StableHLO")
    assert COUNTERS.traced == traced
    assert generate_in(cache)[0]["source"] == "bound"


def test_changed_sources_are_traced_anew(generate_in, filled_cache: Path, tmp_path: Path, text: str) -> None:
    """The IR of an artifact is not that of other sources."""
    (entry,) = entries(Store.open(CacheConfig(cache_dir=filled_cache)))
    cache, key = tmp_path / "cache", make_key({**entry.record.factors, "sources": "0" * 32})
    source = filled_cache / "blobs" / entry.record.mef[:2] / entry.record.mef
    assert Store.open(CacheConfig(cache_dir=cache)).publish(key, source.read_bytes())
    assert generate_in(cache)[0]["source"] == "compiled"


def test_a_fine_tune_compiles_and_traces_nothing(call, twin: Path, small, filled_cache: Path, tmp_path: Path) -> None:
    """The first start of a checkpoint of the same shape, by the counters of the compiler."""
    cache = shutil.copytree(filled_cache, tmp_path / "cache")
    before = (COUNTERS.traced, COUNTERS.compiled)
    place = ("--model", str(twin), "--cache-dir", str(cache), *small, "--prompt", "hello", "--json")
    assert json.loads(call("generate", *place).out)["source"] == "same shape"
    assert (COUNTERS.traced, COUNTERS.compiled) == before
    assert len(list((cache / "blobs").glob("*/*"))) == 1
