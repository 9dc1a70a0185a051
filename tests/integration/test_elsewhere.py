"""Artifacts from elsewhere: exported, imported, compiled for less; each is tried once, and only once."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from max.cache import mef, signing
from max.cache.catalog import entries
from max.cache.config import CacheConfig
from max.cache.exported import export_to, read_manifest
from max.cache.key import Key, make_key
from max.cache.mef import Mef, MefWriter
from max.cache.store import Store
from max.compiler.counters import COUNTERS
from max.runtime import compilation, trial


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

    monkeypatch.setattr(compilation.Compilation, "_traced", compiles)


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


@pytest.fixture
def signing_key(tmp_path: Path) -> tuple[str, str]:
    """A private key, and a file in which its public one is trusted."""
    trusted = tmp_path / "trusted"
    trusted.write_text(signing.new_key(tmp_path / "key"))
    trusted.chmod(0o600)
    return str(tmp_path / "key"), str(trusted)


def test_what_a_start_makes_and_exports_is_signed(
    generate_in, call, model: Path, small, tmp_path: Path, text: str, signing_key, trials
) -> None:
    key, trusted = signing_key
    mefs, maker = tmp_path / "mefs", tmp_path / "maker"
    place = ("--model", str(model), "--cache-dir", str(maker), *small)
    assert call("warm-cache", *place, "--sign-with", key, "--export-mefs", str(mefs)).code == 0
    consumer = ("--require-signed", "--trusted-keys", trusted)
    with_mefs = ("--precompiled-mefs", str(mefs))
    found, _ = generate_in(tmp_path / "mine", *with_mefs, *consumer)
    assert (found["text"], found["source"]) == (text, "precompiled")
    found, err = generate_in(maker, *consumer)
    assert (found["text"], found["source"]) == (text, "bound"), err
    manifest = mefs / "manifest.json"
    rows = json.loads(manifest.read_text())
    rows["artifacts"][0]["signatures"] = None
    manifest.write_text(json.dumps(rows))
    _, err = generate_in(tmp_path / "mine", *with_mefs, *consumer, code=2)
    assert "bears no signature" in err


def test_what_is_sent_is_signed_on_its_way(call, filled_cache: Path, tmp_path: Path, signing_key) -> None:
    key, trusted = signing_key
    here, remote = ("--cache-dir", str(filled_cache)), f"file://{tmp_path}/remote"
    (tmp_path / "remote").mkdir()
    strict = ("--require-signed", "--trusted-keys", trusted)
    bundle = str(tmp_path / "plain.bundle")
    assert call("cache", "export", bundle, *here).code == 0
    assert call("cache", "import", bundle, "--cache-dir", str(tmp_path / "a"), *strict).code == 2
    bundle = str(tmp_path / "signed.bundle")
    assert call("cache", "export", bundle, *here, "--sign-with", key).code == 0
    assert "imported" in call("cache", "import", bundle, "--cache-dir", str(tmp_path / "b"), *strict).out
    assert call("cache", "push", *here, "--cache-remote", remote).out.startswith("pushed")
    pull = ("cache", "pull", "--cache-remote", remote, "--cache-dir", str(tmp_path / "c"), *strict)
    assert "without a signature" in call(*pull).err
    assert call("cache", "push", *here, "--cache-remote", remote, "--sign-with", key).out.startswith("pushed")
    assert "pulled" in call(*pull).out
    assert "signed" in call("cache", "ls", "--cache-dir", str(tmp_path / "c")).out
    assert "signed" not in call("cache", "ls", *here).out, "what is only read is not changed"


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


def for_a_gpu(kind: str, data: bytes) -> bytes:
    """The stamp of code for a GPU, around code for a CPU that would load."""
    if kind != mef.COMPAT:
        return data
    return json.dumps(json.loads(data) | {"target": "cuda:sm_90", "platform": "cuda", "code": "sm_90a"}).encode()


def of_another_jaxlib(kind: str, data: bytes) -> bytes:
    return json.dumps(json.loads(data) | {"jaxlib": "0.0.1"}).encode() if kind == mef.COMPAT else data


def for_more_than_a_cpu_has(kind: str, data: bytes) -> bytes:
    if kind != mef.COMPAT:
        return data
    return json.dumps(json.loads(data) | {"target": "cpu:future", "requires": ["avx2048"]}).encode()


WRONG_SIDES = [
    (for_a_gpu, "compiled for cuda:sm_90 and cannot run on cpu:native: another platform"),
    (for_more_than_a_cpu_has, "compiled for cpu:future and cannot run on cpu:native: it needs avx2048"),
    (of_another_jaxlib, f"compiled by jaxlib 0.0.1, and here is {version('jaxlib')}"),
]


@pytest.mark.parametrize(("change", "trouble"), WRONG_SIDES, ids=lambda each: getattr(each, "__name__", ""))
def test_code_that_is_not_for_this_host_is_told_and_made_anew(
    generate_in, filled_cache: Path, tmp_path: Path, text: str, caplog, trials, change, trouble: str
) -> None:
    cache = tmp_path / "cache"
    (entry,) = entries(Store.open(CacheConfig(cache_dir=filled_cache)))
    store = Store.open(CacheConfig(cache_dir=cache))
    source = filled_cache / "blobs" / entry.record.mef[:2] / entry.record.mef
    store.publish(Key(entry.record.key, entry.record.factors), lambda path: rewritten(source, path, change))
    found, _ = generate_in(cache)
    assert (found["text"], found["source"], trials) == (text, "compiled", [])
    assert trouble in caplog.text
    assert generate_in(cache)[0]["source"] == "bound"


@pytest.mark.parametrize(("change", "trouble"), WRONG_SIDES, ids=lambda each: getattr(each, "__name__", ""))
def test_a_precompiled_artifact_that_is_not_for_this_host_is_two_lines(
    call, model: Path, small, exported: Path, tmp_path: Path, change, trouble: str
) -> None:
    (row,) = read_manifest(exported).artifacts
    rewritten(exported / row.file, tmp_path / "other.mef", change)
    export_to(tmp_path / "mefs", Key(row.key, row.factors), Mef.open(tmp_path / "other.mef"), None)
    place = ("--model", str(model), "--cache-dir", str(tmp_path / "cache"), *small, "--prompt", "hello")
    done = call("generate", *place, "--precompiled-mefs", str(tmp_path / "mefs"))
    assert done.code == 2 and trouble in done.errors[-2] and done.errors[-1].startswith("hint: ")


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
