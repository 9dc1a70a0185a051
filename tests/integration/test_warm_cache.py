"""`max warm-cache`: what it makes, what it says of it, and that every command finds it afterwards."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from max.cache import mef


def test_it_makes_what_generate_needs(run, call, small, model: Path, tmp_path: Path) -> None:
    place = ("--model", str(model), "--cache-dir", str(tmp_path / "cache"), *small)
    made = run("warm-cache", *place)
    assert made.code == 0
    first, seconds, artifact, weights = made.out.splitlines()
    assert re.fullmatch(rf"{model.name} for cpu:native: made now \(compiled\), 6 graphs in \d+ executables", first)
    assert re.fullmatch(
        r"  seconds   lookup [\d.]+ s, import [\d.]+ s, compile [\d.]+ s, prepare weights [\d.]+ s", seconds
    )
    assert re.fullmatch(rf"  artifact  [0-9a-f]{{64}}  [\d.]+ MB  {tmp_path}/cache/blobs/../[0-9a-f]{{64}}", artifact)
    assert re.fullmatch(rf"  weights   [0-9a-f]{{64}}  [\d.]+ MB  {tmp_path}/cache/prepared/../[0-9a-f]{{64}}", weights)
    assert [line.split(":")[0] for line in made.errors] == ["trace", "compile", "prepare weights"]

    again = call("warm-cache", *place)
    assert again.err == "" and again.out.splitlines()[0] == f"{model.name} for cpu:native: all was there already"
    assert again.out.splitlines()[2:] == [artifact, weights]
    assert json.loads(call("generate", *place, "--prompt", "x", "--json").out)["source"] == "bound"


def test_json_names_files_that_are_there(call, small, model: Path, filled_cache: Path) -> None:
    done = call("warm-cache", "--model", str(model), "--cache-dir", str(filled_cache), *small, "--json")
    found = json.loads(done.out)
    assert done.err == ""
    assert (found["cached"], found["reason"], found["target"]) == (True, "bound", "cpu:native")
    artifact, weights = Path(found["artifact_path"]), Path(found["weights_path"])
    assert (artifact.stat().st_size, weights.stat().st_size) == (found["artifact_bytes"], found["weights_bytes"])
    assert artifact.is_relative_to(filled_cache) and found["cache_dir"] == str(filled_cache)
    assert mef.Mef.open(artifact).id == found["artifact"] == artifact.name
    assert (filled_cache / "index" / f"{found['key']}.json").is_file()


def test_an_artifact_holds_no_trace_of_its_checkpoint(model: Path, filled_cache: Path) -> None:
    artifact = mef.Mef.open(next((filled_cache / "blobs").glob("*/*")))
    text = b"".join(
        artifact.read(each) for each in artifact.sections() if each.kind not in (mef.NATIVE, mef.PROVENANCE)
    )
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert str(model).encode() not in text and digest.encode() not in text


def test_targets_of_the_same_code_have_the_same_key(call, small, model: Path, filled_cache: Path) -> None:
    place = ("warm-cache", "--model", str(model), "--cache-dir", str(filled_cache), *small, "--cache-policy", "require")
    for target in ((), ("--target", "cpu"), ("--target", "cpu:native"), ("--devices", "cpu")):
        assert json.loads(call(*place, *target, "--json").out)["cached"] is True


def test_it_says_when_nothing_is_kept(call, small, model: Path, tmp_path: Path) -> None:
    place = ("--model", str(model), "--cache-dir", str(tmp_path / "cache"), *small)
    done = call("warm-cache", *place, "--cache-policy", "off")
    assert done.code == 0 and done.out.splitlines()[2:] == [
        "  artifact  not kept", "  weights   not kept", "  not everything is kept: --cache-policy is off"
    ]  # fmt: skip
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").write_text("")
    found = json.loads(call("warm-cache", *place, "--cache-dir", str(tmp_path / "file"), "--json").out)
    assert (found["cached"], found["artifact_path"], found["weights_path"]) == (False, None, None)


def test_a_cache_too_small_keeps_what_was_just_made(call, small, model: Path, filled_cache: Path, cache: Path) -> None:
    place = ("--model", str(model), "--cache-dir", str(cache), *small, "--max-length", "32", "--json")
    made = json.loads(call("warm-cache", *place, "--max-cache-size", "1").out)
    assert made["cached"] is False and Path(made["artifact_path"]).is_file()
    assert len(list((cache / "blobs").glob("*/*"))) == 1
    assert json.loads(call("warm-cache", *place).out)["cached"] is True


def test_the_architectures_are_listed(run) -> None:
    done = run("list", "--json")
    rows = json.loads(done.out)["architectures"]
    assert done.err == "" and rows["LlamaForCausalLM"]["supported_encodings"][:3] == ["float32", "bfloat16", "q8_0"]
    assert rows["LlamaForCausalLM"]["formats"] == ["safetensors", "gguf"]
    assert rows["LlamaForCausalLM"]["example_repo_ids"]
    plain = run("list").out
    assert all(name in plain for name in rows)
