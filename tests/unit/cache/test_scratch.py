"""Scratch folders: gone with their process, however it ends, and swept by the next one where it was killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from max.cache.scratch import Scratch, remove_all


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files lie here, and in the processes that tests start."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old(path: Path) -> Path:
    os.utime(path, (1, 1))
    return path


def test_a_folder_is_private_and_removed_with_all_that_is_in_it(temporary: Path) -> None:
    with Scratch("compile") as scratch:
        assert scratch.path.parent == temporary and scratch.path.name.startswith("max-compile-")
        assert stat.S_IMODE(scratch.path.stat().st_mode) == 0o700
        (scratch.path / "a" / "b").mkdir(parents=True)
        (scratch.path / "a" / "file").write_text("x")
    assert left(temporary) == []
    scratch.remove()


def test_an_error_removes_it_too(temporary: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Scratch("serve"):
        raise KeyboardInterrupt
    assert left(temporary) == []


def test_what_a_killed_process_left_is_swept_and_nothing_else(temporary: Path) -> None:
    abandoned, young = temporary / "max-compile-abcdefgh", temporary / "max-serve-abcdefgh"
    others = [temporary / name for name in ("max-compile-abcdefghi", "max-other-abcdefgh", "max-abcdefgh", "tmpabcdef")]
    for folder in (abandoned, young, *others):
        folder.mkdir()
        (folder / "file").write_text("x")
    link = temporary / "max-serve-linklink"
    link.symlink_to(others[0])
    os.utime(link, (1, 1), follow_symlinks=False)
    for folder in (abandoned, *others):
        old(folder)
    with Scratch("metrics") as first:
        old(first.path)
        with Scratch("metrics") as second:
            assert set(temporary.iterdir()) == {young, *others, link, first.path, second.path}
            assert (others[0] / "file").exists()


RUN = """
import os, sys, time
from max.cache.scratch import Scratch
from max.cli.main import _tidy_up_when_ended
_tidy_up_when_ended()
scratch = Scratch("compile")
(scratch.path / "file").write_text("x")
match sys.argv[1]:
    case "error": raise ValueError
    case "exit": sys.exit(3)
    case "fork":
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
        assert scratch.path.exists(), "a copy of the process removes nothing"
    case "wait":
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("how", ["end", "error", "exit", "fork"])
def test_the_end_of_the_process_removes_it(how: str, temporary: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, how], capture_output=True, text=True, check=False)
    assert done.returncode == {"error": 1, "exit": 3}.get(how, 0), done.stderr
    assert left(temporary) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_removes_it_or_else_the_next_process(number: signal.Signals, temporary: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "wait"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    (path,) = temporary.iterdir()
    old(path)
    with Scratch("compile"):
        assert path.exists(), "it is held"
    process.send_signal(number)
    assert process.wait() == -number
    process.stdout.close()
    assert path.exists() == (number == signal.SIGKILL)
    with Scratch("compile"):
        assert not path.exists()


def test_all_folders_of_a_process_that_ends_at_once(temporary: Path) -> None:
    held = [Scratch("compile"), Scratch("xla-dump")]
    remove_all()
    assert left(temporary) == []
    for scratch in held:
        scratch.remove()
