"""`max cache`: every command on a small store, as text and as JSON, and what it says of names that are wrong."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from max.cache import mef, signing
from max.cache.binding import Binding, checkpoint_identity
from max.cache.config import CacheConfig
from max.cache.key import make_key
from max.cache.mef import MefWriter
from max.cache.store import Store
from max.cli import main
from max.cli.cache import SUBCOMMANDS

FACTORS = {
    "architecture": "LlamaForCausalLM",
    "target": {"platform": "cpu", "arch": "native", "features": ["avx2"], "machine": "x86_64"},
    "packing": "bfloat16",
    "limits": {"max_length": 1024, "token_buckets": [1, 2, 4]},
}


def write(path: Path, text: str = "one") -> None:
    with MefWriter(path) as writer:
        calls = {"arguments": [], "outputs": [], "calls": [["block", [0], [1]], ["block", [1], [2]]], "returns": [2]}
        writer.add_json(mef.MANIFEST, "", {"name": text, "target": "cpu:native", "graphs": {"step": calls}})
        writer.add_json(mef.COST, "", {"block": {"flops": 1_000_000, "bytes": 2000}})
        writer.add_json(mef.MEMORY, "", {"block": {"temporary": 4096}})
        writer.add(mef.JAXPR, "step", b"{ lambda ; a:f32[1]. let  in (a,) }")
        writer.add(mef.NATIVE, "block", b"\x7fELF" * 100, target="cpu:native", codec="none")
        writer.finish()


def binding(key, mef_id: str) -> Binding:
    return Binding(
        digest="d" * 32,
        key=key.digest,
        factors=key.factors,
        checkpoint=checkpoint_identity({"path": "/models/llama", "files": [], "sha256": "a" * 64}),
        mef=mef_id,
        prepared="c" * 64,
        files=(),
        stop_token_ids=(2,),
        generation={},
        max_length=1024,
        architecture="LlamaForCausalLM",
        created=time.time(),
        versions={},
    )


@pytest.fixture
def store(cache_dir: Path) -> Store:
    """Two entries, the first of which is bound to a checkpoint."""
    store = Store.open(CacheConfig(cache_dir=cache_dir))
    first = make_key(FACTORS)
    made = store.publish(first, lambda path: write(path), command="warm-cache", seconds=3.0)
    second = make_key({**FACTORS, "limits": {"max_length": 2048, "token_buckets": [1, 2, 4, 8]}})
    assert made and store.publish(second, lambda path: write(path, "two"))
    store.publish_binding(binding(first, made.id))
    return store


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `max cache` with these arguments and returns stdout; `code` is the exit code expected."""

    def run(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main.run(["cache", *arguments]) == code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def keys(store: Store) -> list[str]:
    return sorted(path.stem for path in (store.root / "index").iterdir())


def test_ls(store, call) -> None:
    rows = json.loads(call("ls", "--json"))
    assert sorted(row["key"] for row in rows) == keys(store)
    bound = next(row for row in rows if row["checkpoints"])
    assert (bound["key"], bound["target"]) == (make_key(FACTORS).digest, "cpu:native")
    assert (bound["checkpoints"], bound["seconds"]) == (["/models/llama"], 3.0)
    text = call("ls")
    assert all(key[:12] in text for key in keys(store)) and "llama" in text
    assert len(json.loads(call("ls", "--limit", "1", "--json"))) == 1


def test_an_empty_cache_is_not_made_by_looking(call, cache_dir: Path) -> None:
    assert call("ls") == f"no entries in {cache_dir}\n"
    assert json.loads(call("stats", "--json"))["entries"] == 0
    assert "is not there" in call("doctor")
    assert call("verify") == "0 checked, 0 damaged\n"
    assert not cache_dir.exists()


def test_stats(store, call) -> None:
    found = json.loads(call("stats", "--json"))
    assert (found["entries"], found["checkpoints"], found["folders"]["blobs"]["files"]) == (2, 1, 2)
    assert found["folders"]["blobs"]["bytes"] == sum(p.stat().st_size for p in store.root.glob("blobs/*/*"))
    assert "2 entries for 1 checkpoints" in call("stats")
    assert store.publish_derived("e" * 32, b"x" * 1000, "tokenizer")
    counted = json.loads(call("stats", "--json"))
    files = [path for path in store.root.rglob("*") if path.is_file() and path.name != "VERSION"]
    assert counted["bytes"] == sum(path.stat().st_size for path in files) > found["bytes"] + 1000


def test_inspect(store, call, tmp_path: Path) -> None:
    name = make_key(FACTORS).digest[:8]
    found = json.loads(call("inspect", name, "--json"))
    (graph,) = found["graphs"]
    assert (graph["calls"], graph["executables"], graph["flops"]) == (2, 1, 2_000_000)
    assert (graph["bytes"], graph["temporary_bytes"], graph["code_bytes"]) == (4000, 4096, 400)
    assert [each["kind"] for each in found["sections"]] == ["manifest", "cost", "memory", "jaxpr", "native"]
    assert "step" in call("inspect", name)
    assert json.loads(call("inspect", name, "--section", "cost")) == {"block": {"flops": 1_000_000, "bytes": 2000}}
    assert call("inspect", name, "--section", "jaxpr/step").startswith("{ lambda")
    call("inspect", name, "--section", "native", "--output", str(tmp_path / "code"))
    assert (tmp_path / "code").read_bytes() == b"\x7fELF" * 100
    path = store.blob_path(found["artifact"])
    assert json.loads(call("inspect", str(path), "--json"))["artifact"] == found["artifact"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "zzzz"),
        ("inspect", "ab"),
        ("inspect", "KEY", "--section", "nothing"),
        ("inspect", "KEY", "--output", "/tmp/x"),
        ("diff", "KEY", "ffffffffff"),
        ("pin", "ffffffffff"),
        ("sign",),
        ("sign", "KEY", "--all"),
        ("sign", "KEY", "--key-file", "/nowhere/key"),
    ],
)
def test_what_is_not_there_is_two_lines(store, capsys, arguments: tuple[str, ...]) -> None:
    given = [keys(store)[0] if each == "KEY" else each for each in arguments]
    assert main.run(["cache", *given]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and [line.split(":")[0] for line in shown.err.splitlines()] == ["error", "hint"]


def test_diff(store, call) -> None:
    first, second = make_key(FACTORS).digest, next(k for k in keys(store) if k != make_key(FACTORS).digest)
    found = json.loads(call("diff", first, second, "--json"))["differences"]
    assert found == [
        {"factor": "limits.max_length", "first": 1024, "second": 2048},
        {"factor": "limits.token_buckets", "first": [1, 2, 4], "second": [1, 2, 4, 8]},
    ]
    text = call("diff", first, second)
    assert "limits.max_length" in text and "with 8" in text
    assert call("diff", first, first) == "no factor differs\n"


def test_pins_protect_from_pruning(store, call) -> None:
    first = make_key(FACTORS).digest
    call("pin", first)
    assert json.loads(call("ls", "--json"))[0]["pinned"] or json.loads(call("ls", "--json"))[1]["pinned"]
    would = json.loads(call("prune", "--all", "--dry-run", "--json"))
    assert would["dry_run"] and len(keys(store)) == 2
    done = json.loads(call("prune", "--all", "--json"))
    assert [each["path"] for each in done["files"]] == [each["path"] for each in would["files"]]
    assert keys(store) == [first] and len(list((store.root / "bindings").iterdir())) == 1
    call("unpin", first)
    call("prune", "--all")
    assert keys(store) == [] and list((store.root / "bindings").iterdir()) == []


def test_prune_by_age(store, call) -> None:
    old = store.root / "index" / f"{make_key(FACTORS).digest}.json"
    os.utime(old, (1.0, time.time() - 10 * 86400))
    call("prune", "--max-cache-age", "20")
    assert len(keys(store)) == 2
    call("prune", "--max-cache-age", "5")
    assert len(keys(store)) == 1 and not old.exists()


def test_prune_clears_the_quarantine_when_told(store, call) -> None:
    (store.root / "quarantine" / "bad").write_bytes(b"x" * 10)
    call("prune")
    assert (store.root / "quarantine" / "bad").exists()
    assert json.loads(call("prune", "--quarantine", "--json"))["bytes"] == 10
    assert not (store.root / "quarantine" / "bad").exists()


def test_verify_names_what_is_damaged(store, call) -> None:
    (store.root / "bindings" / f"{'d' * 32}.json").unlink()  # its prepared weights were never made
    assert json.loads(call("verify", "--json")) == {"checked": 4, "damaged": [], "untried": []}
    blob = next(store.root.glob("blobs/*/*"))
    data = bytearray(blob.read_bytes())
    data[5000] ^= 1
    blob.write_bytes(data)
    (store.root / "index" / f"{'e' * 32}.json").write_text("{}")
    found = json.loads(call("verify", "--json", code=1))["damaged"]
    assert {(each["kind"], each["name"]) for each in found} == {("index", "e" * 32), ("artifact", blob.name)}
    assert "2 damaged" in call("verify", code=1)
    assert blob.exists(), "verify only looks"


def test_verify_misses_prepared_weights_that_are_gone(store, call) -> None:
    (bad,) = json.loads(call("verify", "--json", code=1))["damaged"]
    assert (bad["kind"], bad["name"]) == ("weights", "c" * 64)


def test_keys_and_signatures(store, call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    line = call("key", "new")
    assert line.startswith("ed25519 ") and call("key", "show") == line
    first = make_key(FACTORS).digest
    (done,) = json.loads(call("sign", first, "--json"))
    assert (done["key"], done["signer"]) == (first, line.split()[1])
    assert [row["signers"] for row in json.loads(call("ls", "--json")) if row["key"] == first] == [[done["signer"]]]
    trusted = tmp_path / "trusted"
    trusted.write_text(line)
    trusted.chmod(0o600)
    checked = ("verify", "--require-signed", "--trusted-keys", str(trusted), "--json")
    bad = json.loads(call(*checked, code=1))["damaged"]
    assert [each["name"] for each in bad if each["kind"] == "signature"] == [k for k in keys(store) if k != first]
    call("sign", "--all")
    assert not [each for each in json.loads(call(*checked, code=1))["damaged"] if each["kind"] == "signature"]
    assert signing.read_trusted(trusted)


def test_doctor(store, call) -> None:
    found = {each["check"]: each for each in json.loads(call("doctor", "--json"))}
    assert found["folder"]["state"] == found["writing"]["state"] == found["layout"]["state"] == "ok"
    assert "1 prepared" not in found["orphans"]["detail"] and found["orphans"]["state"] == "ok"
    (store.root / "tmp" / "left").write_text("")
    (store.root / "leases" / f"{'a' * 32}.0").write_text('{"pid": 4194304}')
    os.utime(store.root / "leases" / f"{'a' * 32}.0", (1, 1))
    store.root.chmod(0o777)
    found = {each["check"]: each for each in json.loads(call("doctor", "--json", code=1))}
    assert found["folder"]["state"] == "trouble" and "everybody may write" in found["folder"]["detail"]
    assert "1 temporary files" in found["orphans"]["detail"]
    text = call("doctor", code=1)
    assert text.startswith("BAD  folder") and "warn leases" in text


def test_help_has_examples_and_loads_little() -> None:
    """One process asks for the help of one command after the other: whatever the first ones load would be seen."""
    code = (
        "import contextlib, io, json, sys; from max.cli.main import run; shown = {}\n"
        "for name in sys.argv[1:]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        code = run(['cache', *([name] if name else []), '--help'])\n"
        "    heavy = {'jax', 'jaxlib', 'numpy', 'rich', 'cryptography', 'obstore', 'transformers'} & set(sys.modules)\n"
        "    shown[name] = [code, sorted(heavy), out.getvalue()]\n"
        "print(json.dumps(shown))"
    )
    names = ["", *sorted(SUBCOMMANDS)]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    assert list(shown) == names
    for name, (status, heavy, text) in shown.items():
        assert (status, heavy) == (0, []), name
        assert f"\n  max cache {name}".rstrip() in text.partition("\n")[2], "an example"


def test_what_is_for_other_machines_is_not_tried(cache_dir: Path, call) -> None:
    stamps = {
        "lowered": {"form": "lowered", "platform": "cuda", "target": "cuda:sm_90", "requires": []},
        "a GPU's": {"platform": "cuda", "target": "cuda:sm_90", "requires": []},
        "a larger CPU's": {"platform": "cpu", "target": "cpu:native", "requires": ["avx1024"]},
    }
    store = Store.open(CacheConfig(cache_dir=cache_dir))
    for name, stamp in stamps.items():

        def write_one(path: Path, stamp: dict[str, object] = stamp) -> None:
            with MefWriter(path) as writer:
                writer.add_json(mef.MANIFEST, "", {"target": stamp["target"], "facts": {}, "graphs": {}})
                writer.add_json(mef.SIGNATURES, "", {})
                writer.add_json(mef.COMPAT, "", stamp)
                writer.finish()

        assert store.publish(make_key({**FACTORS, "name": name}), write_one)
    found = json.loads(call("verify", "--run", "--json"))
    assert not found["damaged"]
    reasons = sorted(each["reason"] for each in found["untried"])
    assert reasons[0] == "it holds no code yet"
    assert "it needs avx1024" in reasons[1] and "cannot run on cpu:native: another platform" in reasons[2]
    assert "0 damaged, 3 not tried" in call("verify", "--run")
