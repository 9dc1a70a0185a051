"""Control-C at any time, and two starts at once: no traceback, nothing half made, no work done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `max` with pipes, in a process group of its own; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_max(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-u", "-m", "max", *arguments]
        process = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start_max
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for(process: subprocess.Popen[str], beginning: str) -> None:
    """Reads stderr until a line begins so."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(beginning):
            return
    raise AssertionError(f"{beginning!r} was not said")


def interrupted(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Interrupts the process; returns what it still says on stdout and stderr."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    return out, err


@pytest.fixture
def place(model: Path, small, tmp_path: Path) -> tuple[str, ...]:
    return ("--model", str(model), "--cache-dir", str(tmp_path / "cache"), *small)


@pytest.mark.parametrize("phase", ["trace:", "compile:"])
def test_an_interrupt_while_compiling(start, place, tmp_path: Path, phase: str) -> None:
    process = start("generate", *place, "--prompt", "hello")
    wait_for(process, phase)
    out, err = interrupted(process)
    assert out == "" and "Traceback" not in err and "error" not in err
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["VERSION"]


@pytest.mark.parametrize(
    ("number", "target", "kind"),
    [
        (signal.SIGINT, "cpu:x86-64-v2", "compile"),
        (signal.SIGTERM, "cpu:x86-64-v2", "compile"),
        (signal.SIGINT, "cpu", "xla-dump"),
    ],
)
def test_a_signal_leaves_no_temporary_folder(
    start, place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, target: str, kind: str
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    if kind == "xla-dump":
        monkeypatch.setenv("MODULAR_DEBUG", f"ir-output-dir={tmp_path / 'ir'}")
    process = start("warm-cache", *place, "--target", target)
    while not any(path.name.startswith(f"max-{kind}-") for path in temporary.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130}.get(number, -number) and "Traceback" not in err
    assert list(temporary.iterdir()) == []


def test_an_interrupt_while_generating(start, place, filled_cache: Path) -> None:
    warm = (*place, "--cache-dir", str(filled_cache), "--prompt", "hello", "--num-warmups", "1000000")
    process = start("--log-level", "debug", "generate", *warm)
    wait_for(process, "DEBUG max.cli.generation: preparation")
    assert interrupted(process) == ("", "\n")  # the line that shows ^C is ended


def test_of_two_cold_starts_one_compiles(start, place, tmp_path: Path) -> None:
    arguments = ("generate", *place, "--prompt", "hello", "--seed", "1", "--json")
    first = start(*arguments)
    wait_for(first, "trace:")
    first.send_signal(signal.SIGSTOP)  # so that the second one is sure to find it at work
    second = start(*arguments)
    wait_for(second, "waiting for ")
    first.send_signal(signal.SIGCONT)
    outs = [json.loads(process.communicate(timeout=120)[0]) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert outs[0]["source"] == "compiled" and outs[1]["source"] != "compiled"
    assert outs[0]["text"] == outs[1]["text"]
    assert len(list((tmp_path / "cache" / "blobs").glob("*/*"))) == 1
    assert os.listdir(tmp_path / "cache" / "leases") == os.listdir(tmp_path / "cache" / "tmp") == []


def test_a_killed_maker_is_taken_over_from(start, place, tmp_path: Path) -> None:
    arguments = ("generate", *place, "--prompt", "hello", "--seed", "1", "--json")
    first = start(*arguments)
    wait_for(first, "trace:")
    first.kill()
    first.communicate()
    second = start(*arguments)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0 and json.loads(out)["source"] == "compiled"
    assert "waiting" not in err
    assert os.listdir(tmp_path / "cache" / "leases") == []
