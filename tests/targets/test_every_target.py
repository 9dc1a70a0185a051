"""Every target compiles the built-in model on a host without its device; `make test-targets` installs all compilers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from max.cache import mef
from max.compiler import Target
from max.compiler.targets.listing import target_rows
from max.compiler.targets.toolchain import missing, why_not

SMALL = ("--max-batch-size", "1", "--max-batch-input-tokens", "8", "--max-length", "64")
NAMES = [row.target for row in target_rows()]


def warm(cache: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs `max warm-cache` on the built-in model as a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "max", "warm-cache", "--cache-dir", str(cache), *SMALL, *arguments]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False, timeout=300)


def require(name: str) -> Target:
    """The target, or a skipped test with the reason."""
    target = Target.parse(name)
    if reason := why_not(target):
        pytest.skip(reason)
    if absent := missing(target):
        pytest.skip(f"{' and '.join(absent)} not installed")
    return target


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_and_the_artifact_says_for_what(name: str, cache: Path) -> None:
    target = require(name)
    made = warm(cache, "--target", name, "--json")
    assert made.returncode == 0, made.stderr
    assert {line.split(":")[0] for line in made.stderr.splitlines()} <= {
        "no --model given", "trace", "compile", "prepare weights"
    }, "a plugin's noise"  # fmt: skip
    found = json.loads(made.stdout)
    assert (found["target"], found["cached"]) == (name, False)
    artifact = mef.Mef.open(found["artifact_path"])
    stamp = artifact.json(mef.COMPAT)
    assert (stamp["target"], stamp["platform"]) == (name, target.platform)
    native = [section for section in artifact.sections() if section.kind == mef.NATIVE]
    assert len(native) == found["executables"] and {section.target for section in native} == {name}
    assert all(cost["flops"] or cost["bytes"] for cost in artifact.json(mef.COST).values())
    again = json.loads(warm(cache, "--target", name, "--json").stdout)
    assert again["cached"] is True and again["artifact"] == found["artifact"]


@pytest.mark.parametrize("name", ["cuda:sm_90", "hip:gfx942", "hip:gfx1201", "tpu:v5e"])
def test_weights_are_bfloat16_or_float32(name: str, cache: Path) -> None:
    require(name)
    made = {}
    for element in ("bfloat16", "float32"):
        done = warm(cache, "--target", name, "--quantization-encoding", element, "--json")
        assert done.returncode == 0, done.stderr
        made[element] = json.loads(done.stdout)
        schema = mef.Mef.open(made[element]["artifact_path"]).json(mef.WEIGHTS)
        assert {row["element"] for row in schema["weights"]} == {element}
    assert made["bfloat16"]["key"] != made["float32"]["key"]
    assert 0.45 < made["bfloat16"]["weights_bytes"] / made["float32"]["weights_bytes"] < 0.55


CODE = {"cuda:sm_80": "sm_80", "cuda:sm_90": "sm_90a", "cuda:sm_100": "sm_100a", "cuda:sm_120": "sm_120"}


@pytest.mark.parametrize("name", CODE)
def test_the_ptx_is_for_the_architecture(name: str, tmp_path: Path) -> None:
    require(name)
    folder = tmp_path / "ir"
    made = warm(tmp_path / "cache", "--target", name, MODULAR_DEBUG=f"ir-output-dir={folder}")
    assert made.returncode == 0, made.stderr
    found = {re.search(r"^\.target (\w+)", path.read_text(), re.M) for path in folder.glob("*.6.ptx")}
    assert {match[1] for match in found if match} == {CODE[name]}
    assert (folder / "step_t8_r1.6.ptx").is_file() and (folder / "step_t8_r1.5.optimized.hlo").is_file()


@pytest.mark.parametrize("name", CODE)
def test_the_code_is_elf_for_the_architecture(name: str, cache: Path) -> None:
    """XLA packs an executable with snappy, which leaves what it has not seen before as it is: the head of the ELF."""
    require(name)
    artifact = mef.Mef.open(json.loads(warm(cache, "--target", name, "--json").stdout)["artifact_path"])
    codes = [artifact.read(section) for section in artifact.sections() if section.kind == mef.NATIVE]
    heads = [code[at : at + 80] for code in codes if (at := code.find(b"\x7fELF\x02\x01\x01")) >= 0]
    assert heads, "no executable has a kernel"
    assert all(b"\x02\x00\xbe\x00" in head for head in heads), "an executable file for machine 190, CUDA"
    if name in ("cuda:sm_80", "cuda:sm_90"):  # flags have had another layout since
        assert any(bytes([0x04, int(name.rpartition("_")[2]), 0x00]) in head for head in heads)


def test_measurements_are_used_and_told(tmp_path: Path) -> None:
    require("cuda:sm_90")
    file = tmp_path / "results.txt"
    file.write_text("version: 3\n")
    arguments = ("--target", "cuda:sm_90", "--autotune-results", str(file), "--json")
    made = warm(tmp_path / "cache", *arguments)
    assert made.returncode == 0, made.stderr
    first = json.loads(made.stdout)
    assert mef.Mef.open(first["artifact_path"]).json(mef.COMPAT)["tuned"] == "yes"
    file.write_text("version: 3 # others\n")
    assert json.loads(warm(tmp_path / "cache", *arguments, "--portable").stdout)["key"] != first["key"]
    file.write_text("no measurements at all")
    refused = warm(tmp_path / "cache", *arguments)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()[-2:]) == 2
    assert refused.stderr.splitlines()[-2].startswith("error: ")
