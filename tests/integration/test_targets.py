"""Targets from the command line: several at once, code for CPU levels, StableHLO that is finished later, and faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from max import CacheError
from max.cache import mef
from max.compiler import Target, tuning
from max.compiler import config as compile_config
from max.runtime import prepared
from max.runtime.session import CompiledModels, InferenceSession

V3 = Target.parse("cpu:x86-64-v3")

pytestmark = pytest.mark.skipif(not V3.runs_here(), reason="this host is less than x86-64-v3")


def results(out: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in out.splitlines())


@pytest.fixture(scope="module")
def place(model: Path, small: tuple[str, ...]) -> tuple[str, ...]:
    return ("--model", str(model), *small)


@pytest.fixture(scope="module")
def both(run, place, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Artifacts for x86-64-v3 and for this host, made by one command."""
    folder = tmp_path_factory.mktemp("both")
    done = run(
        "warm-cache", *place, "--cache-dir", str(folder / "cache"), "--json",
        "--target", "cpu:x86-64-v3", "--target", "cpu", "--target", "cpu:native",
    )  # fmt: skip
    assert done.code == 0, done.err
    level, native = results(done.out)  # cpu and cpu:native are one
    return level, native


def test_one_command_makes_several(both) -> None:
    level, native = both
    assert (level["target"], native["target"]) == ("cpu:x86-64-v3", "cpu:native")
    assert level["artifact"] != native["artifact"] and level["weights"] == native["weights"]
    assert not level["cached"] and "prepare weights" not in native["seconds"]


def test_logits_of_a_level_are_those_of_this_host(both) -> None:
    found = []
    for made in both:
        compiled = CompiledModels(mef.Mef.open(made["artifact_path"]))
        weights = prepared.load(Path(made["weights_path"]), threads=1, expected_id=made["weights"])
        step = InferenceSession().init_all(compiled, weights)["step_t2_r1"]
        values = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in step.input_metadata}
        values |= {"tokens": np.array([5, 7], "int32"), "token_src": np.array([-1, -1], "int32")}
        values |= {"positions": np.array([0, 1], "int32"), "slots": np.array([128, 129], "int32")}
        values |= {"lengths": np.array([2], "int32"), "logit_rows": np.array([1], "int32")}
        values["page_table"][:] = 1
        found.append(np.array(step(*values.values())[0]))
    level, native = found
    assert np.isfinite(native).all() and native.std() > 1e-3
    assert np.abs(level - native).max() <= 1e-4 * native.std()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs a disassembler")
def test_code_of_level_3_has_no_instruction_of_level_4(run, place, tmp_path: Path) -> None:
    folder = tmp_path / "ir"
    done = run(
        "warm-cache", *place, "--cache-dir", str(tmp_path / "cache"), "--target", "cpu:x86-64-v3",
        environ={"MODULAR_DEBUG": f"ir-output-dir={folder}"},
    )  # fmt: skip
    assert done.code == 0, done.err
    text = "\n".join(path.read_text() for path in folder.glob("*.6.asm"))
    code = "\n".join(line.split("\t", 1)[1] for line in text.splitlines() if "\t" in line)
    assert "%ymm" in code
    assert not re.search(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b", code)


def test_two_processes_give_one_key_and_the_same_bytes(run, place, tmp_path: Path) -> None:
    """Whatever the order in which Python hashes: also for a platform that nothing is installed for."""
    made = []
    for seed in ("1", "2"):
        cache = ("--cache-dir", str(tmp_path / seed), "--portable", "--json")
        targets = ("--target", "cuda:sm_90", "--target", "cpu:x86-64-v3")
        done = run("warm-cache", *place, *cache, *targets, environ={"PYTHONHASHSEED": seed})
        assert done.code == 0, done.err
        made.append([(row["key"], ir_of(row["artifact_path"])) for row in results(done.out)])
    assert made[0] == made[1]
    assert made[0][0] != made[0][1]


def ir_of(path: str) -> bytes:
    artifact = mef.Mef.open(path)
    return artifact.read(next(section for section in artifact.sections() if section.kind == mef.MODULE))


def test_a_mesh_is_an_entry_of_its_own_with_the_same_weights(run, place, tmp_path: Path) -> None:
    cache = (*place, "--cache-dir", str(tmp_path / "cache"), "--portable", "--json", "--target", "cuda:sm_90")
    one, two = (json.loads(run("warm-cache", *cache, *more).out) for more in ((), ("--devices", "gpu:0,1")))
    assert (one["target"], two["target"]) == ("cuda:sm_90", "cuda:sm_90:1x1x2")
    assert one["key"] != two["key"] and one["weights"] == two["weights"]
    shown = run("cache", "inspect", two["artifact_path"])
    assert "2 devices of cuda:sm_90:1x1x2" in shown.out
    assert "cuda:sm_90:1x1x2" in run("cache", "ls", "--cache-dir", str(tmp_path / "cache")).out
    odd = run("warm-cache", *cache, "--devices", "gpu:0,1,2")
    assert odd.code == 2 and odd.err.splitlines()[-2].startswith(
        "error: the model cannot be split over 3 devices: it has"
    )
    session = InferenceSession("cuda:sm_90")
    with pytest.raises(CacheError, match="compiled for cuda:sm_90:1x1x2 and cannot run on cuda:sm_90"):
        session.init_all(CompiledModels(mef.Mef.open(two["artifact_path"])))


def test_a_share_of_memory_is_no_factor_of_the_key_but_pages_are(run, place, tmp_path: Path) -> None:
    cache = (*place, "--cache-dir", str(tmp_path / "cache"), "--portable", "--json", "--target", "hip:gfx1201")
    keys, pages = [], []
    for share in ("0.9", "0.899", "0.3", "0.08"):
        made = json.loads(run("warm-cache", *cache, "--device-memory-utilization", share).out)
        keys.append(made["key"])
        pages.append(CompiledModels(mef.Mef.open(made["artifact_path"])).facts["limits"]["num_pages"])
    assert keys[0] == keys[1] and pages[0] == pages[1] > pages[2] > pages[3]
    assert len(set(keys)) == 3


# --- StableHLO alone -----------------------------------------------------------------------------------------------


def test_a_lowered_entry_is_finished_at_the_first_start(run, call, place, tmp_path: Path) -> None:
    cache = (*place, "--cache-dir", str(tmp_path / "cache"))
    asked = ("--prompt", "hello", "--seed", "1", "--max-new-tokens", "8", "--json")
    done = run("warm-cache", *cache, "--portable")
    assert done.code == 0 and "made now (lowered), to be compiled at the first start there" in done.out
    (entry,) = (tmp_path / "cache/blobs").glob("*/*")
    artifact = mef.Mef.open(entry)
    assert artifact.json(mef.COMPAT)["form"] == "lowered"
    assert not [section for section in artifact.sections() if section.kind == mef.NATIVE]
    first = json.loads(call("generate", *cache, *asked).out)
    assert first["source"] == "compiled from stored StableHLO"
    traced = json.loads(call("generate", *place, "--cache-dir", str(tmp_path / "other"), *asked).out)
    assert traced["source"] == "compiled" and traced["text"] == first["text"]
    assert json.loads(call("generate", *cache, *asked).out)["source"] == "bound"
    assert json.loads(call("warm-cache", *cache, "--portable", "--json").out)["cached"] is True


def test_a_damaged_lowered_entry_is_traced_again(call, place, tmp_path: Path) -> None:
    cache = (*place, "--cache-dir", str(tmp_path / "cache"), "--json")
    made = json.loads(call("warm-cache", *cache, "--portable").out)
    path = Path(made["artifact_path"])
    artifact = mef.Mef.open(path)
    section = next(section for section in artifact.sections() if section.kind == mef.MODULE)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(section.offset + section.stored_bytes // 2)
        file.write(b"damaged!")
    assert json.loads(call("warm-cache", *cache).out)["reason"] == "compiled"


# --- bad input and faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "guess"), [("cuda:sm_999", "cuda:sm_90"), ("nvidia", "There are: cuda"), ("gpu", "cpu")]
)
def test_unknown_targets_are_answered_before_anything_is_read(call, name: str, guess: str, tmp_path: Path) -> None:
    done = call("warm-cache", "--model", str(tmp_path / "none"), "--target", "cpu", "--target", name)
    assert done.code == 2 and len(done.errors) == 2
    assert f"there is no target '{name}'" in done.errors[0] and guess in done.errors[1]


def test_devices_that_are_not_here_are_refused(call, place) -> None:
    done = call("generate", *place, "--prompt", "x", "--devices", "tpu:v6e")
    assert done.code == 2 and "this host has no tpu:v6e to run on" in done.errors[0]
    assert "max warm-cache --target tpu:v6e" in done.errors[1]


def test_measurements_that_cannot_be_read_or_used(call, place, tmp_path: Path) -> None:
    missing = call("warm-cache", *place, "--autotune-results", str(tmp_path / "none"))
    assert missing.code == 2 and "cannot be read" in missing.errors[-2]
    (tmp_path / "file").write_text("version: 3\n")
    other = call("warm-cache", *place, "--target", "cpu:x86-64-v2", "--cache-dir", str(tmp_path / "c"),
                 "--autotune-results", str(tmp_path / "file"))  # fmt: skip
    assert other.code == 2 and "is for GPUs, and cpu:x86-64-v2 is none" in other.errors[-2]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("--target", "cpu"), "is for GPUs, and cpu:native is none"),
        (("--target", "cuda:sm_90", "--target", "hip"), "goes with one target"),
        (("--target", "cuda:sm_90", "--autotune-results", "other"), "not with --autotune-results"),
        (("--target", "cuda:sm_90"), "this host has no cuda:sm_90 to measure kernels on"),
        (("--devices", "gpu"), "this host has no GPU to run on"),
    ],
)
def test_measuring_takes_one_gpu_of_this_host(call, place, tmp_path: Path, monkeypatch, given, why: str) -> None:
    for module in (compile_config, tuning):
        monkeypatch.setattr(module, "attached", lambda platform: ())
    done = call("warm-cache", *place, *given, "--record-autotune-results", str(tmp_path / "file"))
    assert done.code == 2 and why in done.errors[-2] and done.errors[-1].startswith("hint: ")
    assert not list(tmp_path.iterdir())


def test_what_was_measured_is_compiled_with(call, place, tmp_path: Path, monkeypatch) -> None:
    """As on a host with a GPU, the measuring aside; the artifact is of StableHLO, which needs no plugin."""
    monkeypatch.setattr(tuning, "attached", lambda platform: ("sm_90",))
    seen = []

    def record(artifact: mef.Mef, target: Target, file: Path, progress: object) -> None:
        seen.append((artifact.json(mef.COMPAT)["target"], target.name))
        file.write_text("version: 3\n")

    monkeypatch.setattr(tuning, "record", record)
    cache = (*place, "--cache-dir", str(tmp_path / "cache"), "--portable", "--json", "--target", "cuda:sm_90")
    untuned = json.loads(call("warm-cache", *cache).out)
    tuned = json.loads(call("warm-cache", *cache, "--record-autotune-results", str(tmp_path / "file")).out)
    assert seen == [("cuda:sm_90", "cuda:sm_90")] and tuned["key"] != untuned["key"]
    again = json.loads(call("warm-cache", *cache, "--autotune-results", str(tmp_path / "file")).out)
    assert again["cached"] and again["key"] == tuned["key"]


def start(cache: Path, place: tuple[str, ...], before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "max", "warm-cache", *place, "--cache-dir", str(cache)]
    return subprocess.Popen(
        [*before, *command, "--target", "cpu:x86-64-v2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_in_the_middle_it_leaves_no_half_entry(run, place, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(cache, place)
    assert process.stderr is not None and process.stdout is not None
    while not process.stderr.readline().startswith("trace"):
        assert process.poll() is None
    child = wait_for_child(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    process.stdout.close()
    assert not list((cache / "index").glob("*"))
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists(), "the compile process ends with its parent"
    again = run("warm-cache", *place, "--cache-dir", str(cache), "--target", "cpu:x86-64-v2", "--json")
    assert again.code == 0 and json.loads(again.out)["reason"] == "compiled"


def test_a_killed_compile_process_is_two_lines_and_no_entry(place, tmp_path: Path) -> None:
    process = start(tmp_path / "cache", place)
    os.kill(wait_for_child(process.pid), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: the compile process for cpu:x86-64-v2 was ended by SIGKILL; left to do: ")
    assert hint.startswith("hint: Run the command again; nothing half-done was kept.")
    assert not list((tmp_path / "cache/index").glob("*"))


def wait_for_child(parent: int) -> int:
    """The compile process of a command, once it is there."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in children.read_text().split():
            if "compile_worker" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
        time.sleep(0.01)
    raise AssertionError("no compile process was started")


def test_a_disk_that_is_full_in_the_middle(place, tmp_path: Path) -> None:
    """No file may grow beyond 50 or 100 kB: the artifact cannot be kept, and nothing else goes wrong."""

    process = start(tmp_path / "cache", place, before=("sh", "-c", 'ulimit -f 100; exec "$@"', "sh"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "not everything is kept" in out and "Traceback" not in err
    assert not list((tmp_path / "cache/index").glob("*"))
