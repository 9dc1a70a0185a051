"""Every mistake that can be made on the command line or in a checkpoint: two lines, exit code 2, and no jax for it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

BUILT_IN = "no --model given: using the built-in dictionary model"

Case = tuple[list[str], str]
"""Arguments, and what the error line holds."""

OPTIONS: dict[str, Case] = {
    "no prompt": ([], "no --prompt was given"),
    "empty prompt": (["--prompt", ""], "the prompt is empty"),
    "long prompt": (["--prompt", "x " * 200], "the context has room for 64"),
    "temperature below": (["--temperature", "-1"], "temperature is -1.0"),
    "temperature nan": (["--temperature", "nan"], "--temperature: 'nan' should be a finite number"),
    "temperature inf": (["--temperature", "inf"], "--temperature: 'inf' should be a finite number"),
    "temperature word": (["--temperature", "warm"], "--temperature: 'warm'"),
    "top-p none": (["--top-p", "0"], "top_p is 0.0"),
    "top-p above": (["--top-p", "1.5"], "top_p is 1.5"),
    "top-k below": (["--top-k", "-5"], "top_k is -5"),
    "top-k fraction": (["--top-k", "1.5"], "--top-k: '1.5'"),
    "min-p above": (["--min-p", "2"], "min_p is 2.0"),
    "repetition penalty": (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
    "frequency penalty": (["--frequency-penalty", "3"], "frequency_penalty is 3.0"),
    "presence penalty": (["--presence-penalty", "-3"], "presence_penalty is -3.0"),
    "seed below": (["--seed", "-1"], "seed is -1"),
    "seed above": (["--seed", str(1 << 64)], f"seed is {1 << 64}"),
    "no new tokens": (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    "new tokens below": (["--max-new-tokens", "-2"], "max_new_tokens is -2"),
    "min above max": (["--min-new-tokens", "9", "--max-new-tokens", "4"], "min_new_tokens is 9"),
    "min below": (["--min-new-tokens", "-1"], "min_new_tokens is -1"),
    "empty stop": (["--stop", ""], "stop holds a string that is empty"),
    "stop token word": (["--stop-token-ids", "1,x"], "--stop-token-ids: 'x'"),
    "stop token below": (["--stop-token-ids", "-1"], "stop_token_ids holds -1"),
    "stop token above": (["--stop-token-ids", "640"], "stop_token_ids holds 640, and the model has no such token"),
    "too long a context": (["--max-length", "4096"], "--max-length 4096 is more than the 2048 tokens"),
    "no context": (["--max-length", "1"], "--max-length: '1'"),
    "batch of none": (["--max-batch-size", "0"], "--max-batch-size: '0'"),
    "warmups below": (["--num-warmups", "-1"], "--num-warmups: '-1'"),
    "no such device": (["--devices", "gpu"], "no GPU"),
    "unknown device": (["--devices", "npu"], "'npu'"),
    "unknown policy": (["--cache-policy", "sometimes"], "'sometimes'"),
    "cache of no size": (["--max-cache-size", "0"], "--max-cache-size: '0'"),
    "encoding": (["--quantization-encoding", "gptq"], "--quantization-encoding gptq is not supported"),
    "rope type": (["--rope-type", "yarn"], "--rope-type yarn is not supported"),
    "rope type of safetensors": (["--rope-type", "neox"], "--rope-type neox says how a GGUF file has its rows"),
    "planned flag": (["--enable-lora"], "--enable-lora is planned: LoRA adapters"),
    "planned value": (["--draft-model-path", "x"], "--draft-model-path is planned: speculative decoding"),
    "planned negation": (["--no-enable-echo"], "--enable-echo is a setting of max serve alone"),
    "unknown option": (["--temprature", "1"], "--temprature"),
    "no template file": (["--chat-template", "/nowhere/template.jinja"], "/nowhere/template.jinja cannot be read"),
    "template is a folder": (["--chat-template", "/"], "the chat template / cannot be read"),
    "broken template": (["--chat-template", "{% if %}"], "is not valid Jinja"),
    "refusing template": (["--chat-template", "{{ raise_exception('no') }}"], "refuses the conversation: no"),
    "no config file": (["--config-file", "/nowhere/settings.yaml"], "there is no config file"),
    "prompt of broken text": (["--prompt", "\udcff"], "not valid Unicode"),
}

MODELS: dict[str, str] = {
    "no folder": "there is no folder",
    "no config": "holds no config.json",
    "a file": "is a file, not a folder",
    "config is no JSON": "is not JSON",
    "config is a list": "is not a JSON object",
    "unknown architecture": "LlamaForCausalML",
    "no architecture": "names no architecture",
    "no weights": "holds no weights",
    "truncated weights": "model.safetensors",
    "empty weights": "is truncated",
    "garbage header": "is not a JSON object",
    "long header": "claims a header of",
    "lying offsets": "takes another size than its offsets",
    "overlapping offsets": "overlaps the tensor before it",
    "wrong tensors": "the tensors in",
    "integer weights": "of a type that is not read",
    "no tokenizer": "has no tokenizer.json",
    "damaged tokenizer": "tokenizer.json cannot be read",
    "damaged defaults": "temperature is 'hot'",
    "no layers": "num_hidden_layers",
    "odd heads": "attention heads",
    "missing key": "hidden_size",
    "damaged template": "is not valid Jinja",
}


def _edit(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None takes a key away."""
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not None}))


def _with_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the header of a safetensors file and leaves the data as they are."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def _lie(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"][1] += 4


def _overlap(header: dict[str, Any]) -> None:
    offsets = header["model.layers.0.self_attn.k_proj.weight"]["data_offsets"]
    header["model.layers.0.self_attn.v_proj.weight"]["data_offsets"] = offsets


def _damage(folder: Path, damage: str) -> None:
    """Does to a sound checkpoint what the name of the case says."""
    config, weights, tokenizer = (folder / name for name in ("config.json", "model.safetensors", "tokenizer.json"))
    match damage:
        case "no config":
            config.unlink()
        case "config is no JSON":
            config.write_text('{"architectures": [')
        case "config is a list":
            config.write_text("[]")
        case "unknown architecture":
            _edit(config, architectures=["LlamaForCausalML"])
        case "no architecture":
            _edit(config, architectures=None)
        case "no weights":
            weights.unlink()
        case "truncated weights":
            os.truncate(weights, weights.stat().st_size - 100)
        case "empty weights":
            os.truncate(weights, 0)
        case "garbage header":
            weights.write_bytes(struct.pack("<Q", 64) + os.urandom(64) + weights.read_bytes()[72:])
        case "long header":
            weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
        case "lying offsets":
            _with_header(weights, _lie)
        case "overlapping offsets":
            _with_header(weights, _overlap)
        case "wrong tensors":
            tensors = load_file(weights)
            tensors["model.extra.weight"] = np.zeros(3, np.float32)
            del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
            tensors["model.norm.weight"] = np.zeros(63, np.float32)
            save_file(tensors, weights)
        case "integer weights":
            tensors = load_file(weights)
            tensors["model.norm.weight"] = np.zeros(64, np.int32)
            save_file(tensors, weights)
        case "no tokenizer":
            tokenizer.unlink()
        case "damaged tokenizer":
            os.truncate(tokenizer, 1000)
        case "damaged defaults":
            _edit(folder / "generation_config.json", temperature="hot")
        case "no layers":
            _edit(config, num_hidden_layers=0)
        case "odd heads":
            _edit(config, num_key_value_heads=3)
        case "missing key":
            _edit(config, hidden_size=None)
        case "damaged template":
            (folder / "chat_template.jinja").write_text("{{ messages[ }}")
        case _:
            raise AssertionError(damage)


def _cases(folder: Path, model: Path, filled_cache: Path, small: tuple[str, ...]) -> dict[str, list[str]]:
    """The whole command line of each case."""
    place = ["--cache-dir", str(folder / "cache"), *small]
    cases = {}
    for name, (arguments, _) in OPTIONS.items():
        prompt = [] if name == "no prompt" else ["--prompt", "x"]  # the last one given counts
        cases[name] = ["generate", "--model", str(model), *place, *prompt, *arguments]
    for name in MODELS:
        place_of_model = folder / name.replace(" ", "-")
        if name == "a file":
            place_of_model.write_text("")
        elif name != "no folder":
            shutil.copytree(model, place_of_model)
            _damage(place_of_model, name)
        cases[name] = ["generate", "--model", str(place_of_model), *place, "--prompt", "x"]
        cases[f"warm-cache of {name}"] = ["warm-cache", "--model", str(place_of_model), *place]
    warm = ["--model", str(model), "--cache-dir", str(filled_cache)]
    for name in ("long prompt", "temperature below", "stop token above"):
        cases[f"warm {name}"] = ["generate", *place, *warm, "--prompt", "x", *OPTIONS[name][0]]
    cases["built-in"] = ["generate", *place, "--prompt", "x", "--seed", "-1"]
    cases["hub name"] = ["generate", *place, "--prompt", "x", "--model", "meta-llama/Llama-3.2-1B"]
    for target in ("foo", "cuda:sm_91", ""):
        cases[f"target {target}"] = ["warm-cache", "--model", str(model), *place, "--target", target]
    for name, text in {"near": "temprature: 1", "nested": "generate_config: 3", "value": "top_k: many"}.items():
        (folder / f"{name}.yaml").write_text(text)
        cases[f"yaml {name}"] = ["generate", *place, "--prompt", "x", "--config-file", str(folder / f"{name}.yaml")]
    return cases


_CHILD = """
import contextlib, io, json, os, sys
from max.cli import generation, warming
from max.cli.main import run
from max.compiler.counters import COUNTERS
cases, folder = sys.argv[1:]
with open(cases) as file:
    named = json.load(file)
for name, arguments in named.items():
    if os.fork():
        os.wait()
        continue
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([each.encode("latin-1").decode("utf-8", "surrogateescape") for each in arguments])
    heavy = sorted({"jax", "flax", "transformers", "max.models.build"} & sys.modules.keys())
    work = [COUNTERS.traced, COUNTERS.compiled, COUNTERS.loaded]
    with open(os.path.join(folder, name), "w") as file:
        json.dump([code, out.getvalue(), err.getvalue(), heavy, work], file)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, model: Path, filled_cache: Path, small: tuple[str, ...]
) -> dict[str, list[Any]]:
    """What each case came to. Each has a process of its own, forked off one that has imported the commands."""
    folder = tmp_path_factory.mktemp("bad")
    results = tmp_path_factory.mktemp("results")
    cases = _cases(folder, model, filled_cache, small)
    encoded = {
        name: [each.encode("utf-8", "surrogateescape").decode("latin-1") for each in arguments]
        for name, arguments in cases.items()
    }
    (folder / "cases.json").write_text(json.dumps(encoded))
    child = [sys.executable, "-W", "error", "-c", _CHILD, str(folder / "cases.json"), str(results)]
    # A process with threads, as OpenBLAS starts them, should not fork.
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(child, cwd="/", env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = {name: json.loads((results / name).read_text()) for name in cases}
    return {"cache": list((folder / "cache").glob("*/*")), **found}


def _refused(outcome: list[Any], needle: str, first: tuple[str, ...] = ()) -> list[str]:
    """Checks all that holds for every mistake; returns the error and the hint."""
    code, out, err, heavy, work = outcome
    lines = err.splitlines()
    assert lines[: len(first)] == list(first)
    lines = lines[len(first) :]
    assert [line.partition(": ")[0] for line in lines] == ["error", "hint"], err
    assert needle in lines[0]
    assert len(lines[1]) > len("hint: .")
    assert (code, out, heavy, work) == (2, "", [], [0, 0, 0])
    return lines


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_option(outcomes, name: str) -> None:
    _refused(outcomes[name], OPTIONS[name][1])


@pytest.mark.parametrize("name", ["long prompt", "temperature below", "stop token above"])
def test_a_wrong_option_with_a_warm_cache_loads_nothing(outcomes, name: str) -> None:
    assert _refused(outcomes[f"warm {name}"], OPTIONS[name][1]) == _refused(outcomes[name], OPTIONS[name][1])


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_checkpoint(outcomes, name: str) -> None:
    found = _refused(outcomes[name], MODELS[name])
    assert _refused(outcomes[f"warm-cache of {name}"], MODELS[name]) == found


def test_all_wrong_tensors_are_named_at_once(outcomes) -> None:
    error = outcomes["wrong tensors"][2].splitlines()[0]
    for tensor in ("model.extra.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        assert tensor in error
    assert "model.norm.weight is (63,), config.json needs (64,)" in error


def test_a_near_architecture_is_named(outcomes) -> None:
    assert "LlamaForCausalLM" in outcomes["unknown architecture"][2].splitlines()[1]


def test_a_near_setting_is_named(outcomes) -> None:
    assert _refused(outcomes["yaml near"], "temprature")[1] == "hint: Did you mean temperature?"
    _refused(outcomes["yaml nested"], "generate_config")
    _refused(outcomes["yaml value"], "top_k in ")


@pytest.mark.parametrize("target", ["foo", "cuda:sm_91", ""])
def test_a_target_that_there_is_not(outcomes, target: str) -> None:
    assert "cpu:native" in _refused(outcomes[f"target {target}"], repr(target))[1]


def test_the_built_in_model_is_said_before_the_error(outcomes) -> None:
    _refused(outcomes["built-in"], "seed is -1", first=(BUILT_IN,))


def test_nothing_is_downloaded(outcomes) -> None:
    assert "Nothing is downloaded" in _refused(outcomes["hub name"], "meta-llama/Llama-3.2-1B")[1]


def test_a_mistake_leaves_nothing_in_the_cache(outcomes) -> None:
    assert outcomes["cache"] == []
