"""The compile process: answers, errors, and what its death in the middle looks like from outside."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from max import CompileError, ConfigError
from max.compiler import Graph, Target, TensorType, merge, xla_lowering
from max.compiler.backends import compile_all
from max.compiler.compile_messages import Answer, Job, Start, receive, send
from max.compiler.compile_process import CompileProcess, compiling
from max.compiler.dump import Dump
from max.compiler.targets import toolchain

F = TensorType("float32", (8, 8))
V2 = Target.parse("cpu:x86-64-v2")

pytestmark = pytest.mark.skipif(bool(toolchain.why_not(V2)), reason="made on x86-64 hosts only")


@pytest.fixture(scope="module")
def source() -> bytes:
    graph = Graph("main", lambda x: x @ x, [F])
    return xla_lowering.bytecode(merge.merge("m", {"main": xla_lowering.lower(graph, "cpu").stablehlo}))


def test_messages_come_back_and_an_end_in_the_middle_is_none() -> None:
    pipe = io.BytesIO()
    sent = [Start("cpu", 2), Job("a", b"code", {"x": True, "y": 3, "z": "s"}, "/tmp"), Answer("a", ("what", "hint"))]
    for message in sent:
        send(pipe, message)
    data = pipe.getvalue()
    pipe.seek(0)
    assert [receive(pipe, type(message)) for message in sent] == sent
    assert receive(pipe, Answer) is None
    assert receive(io.BytesIO(data[:20]), Start) is None


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files lie, also of processes that are started here; nothing may be left of them."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    assert list(folder.iterdir()) == []


def test_everything_is_compiled_and_named(source: bytes) -> None:
    sources: dict[str, bytes] = dict.fromkeys(("a", "b", "c"), source)
    found = dict(compile_all(sources, V2, Dump()))
    assert found.keys() == sources.keys()
    for compiled in found.values():
        assert compiled.executable and "HloModule" in compiled.optimized_hlo
        assert compiled.flops >= 8 * 8 * 8 * 2 and compiled.memory["arguments"] == 8 * 8 * 4


def test_dumps_have_the_stages_of_code(source: bytes, tmp_path: Path) -> None:
    dict(compile_all({"a": source}, V2, Dump(tmp_path)))
    assert {"a.4.hlo", "a.5.optimized.hlo", "a.6.ll"} <= {path.name for path in tmp_path.iterdir()}


def test_a_module_that_cannot_be_compiled_is_a_compile_error() -> None:
    with pytest.raises(CompileError, match="broken"):
        dict(compile_all({"broken": b"not a module"}, V2, Dump()))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_its_death_names_signal_target_and_what_was_left(source: bytes, how: signal.Signals) -> None:
    with compiling(V2, 1) as process:
        os.kill(process._process.pid, how)
        with pytest.raises(
            CompileError, match=rf"for cpu:x86-64-v2 was ended by {how.name}; left to do: block"
        ) as caught:
            process.submit(Job("block", source, {}))
            process.answer()
    assert "nothing half-done was kept" in caught.value.hint


def test_its_last_words_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with compiling(V2, 1) as process:
        process._log.write(b"some noise\nfatal: the driver is gone\n")
        os.kill(process._process.pid, signal.SIGABRT)
        with pytest.raises(CompileError) as caught:
            process.answer()
    assert caught.value.hint.endswith("Its last words: fatal: the driver is gone")


def test_it_ends_with_its_parent_whose_folder_it_removes(source: bytes, temporary: Path) -> None:
    script = """
import os, sys, time
from max.compiler import Target
from max.compiler.compile_process import compiling
with compiling(Target.parse("cpu:x86-64-v2"), 1) as process:
    print(process._process.pid, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert [path.name[:12] for path in temporary.iterdir()] == ["max-compile-"]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_a_block_that_fails_leaves_no_process() -> None:
    def fail() -> CompileProcess:
        with compiling(V2, 1) as process:
            seen.append(process)
            raise KeyboardInterrupt
        raise AssertionError

    seen: list[CompileProcess] = []
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert seen[0]._process.returncode == -signal.SIGKILL


# --- toolchains ----------------------------------------------------------------------------------------------------


def without_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("cuda:sm_90", "jax-cuda13-pjrt", "cuda"), ("hip", "jax-rocm7-pjrt", "rocm"), ("tpu", "libtpu", "tpu")],
)
def test_a_missing_plugin_is_answered_with_the_command(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_wheels(monkeypatch)
    target = Target.parse(name)
    with pytest.raises(ConfigError, match=rf"compiling for {target.name} needs {package}") as caught:
        dict(compile_all({}, target, Dump()))
    assert f"pip install 'max-jax[{extra}]'" in caught.value.hint


def cuda_toolkit(folder: Path, mode: int) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "nvvm/libdevice").mkdir(parents=True)
    (folder / "nvvm/libdevice/libdevice.10.bc").touch()
    (folder / "bin/ptxas").touch(mode)
    return folder


def test_an_assembler_that_cannot_be_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_wheels(monkeypatch)
    monkeypatch.setattr(toolchain.Plugin, "find", lambda self: tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(cuda_toolkit(tmp_path, 0o644)))
    assert toolchain.cuda_folder() == tmp_path
    with pytest.raises(ConfigError, match=rf"{tmp_path}/bin/ptxas, .* cannot be executed") as caught:
        toolchain.require(Target.parse("cuda"))
    assert "chmod +x" in caught.value.hint


def test_a_toolkit_serves_where_the_wheels_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_wheels(monkeypatch)
    monkeypatch.setattr(toolchain.Plugin, "find", lambda self: tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(cuda_toolkit(tmp_path, 0o755)))
    assert toolchain.missing(Target.parse("cuda")) == []
    toolchain.require(Target.parse("cuda"))


def test_other_hosts_than_x86_cannot_make_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.host_platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match="made on x86-64 hosts only, and this is aarch64"):
        toolchain.require(V2)
    toolchain.require(Target.parse("cpu"))
