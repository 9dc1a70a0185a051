"""Progress: a line per phase where stderr is no terminal, a bar that leaves nothing behind where it is one."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext

import pytest

from max.cli.progress import ProgressBar


def test_a_line_per_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar() as progress:
        for phase, count in (("trace", 2), ("compile", 3)):
            for done in range(1, count + 1):
                progress(phase, f"item {done}", done, count)
        progress("prepare weights", "", 10, 12_300_000)
        progress("wait", "process 7 on host", 0, 0)
        progress("wait", "process 7 on host", 0, 0)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "trace: 2 items ...",
        "compile: 3 items ...",
        "prepare weights: 12 MB ...",
        "waiting for process 7 on host, which makes the same artifact",
    ]


def test_long_phases_tell_how_far_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("max.cli.progress.time.monotonic", lambda: now)
    with ProgressBar() as progress:
        for now in range(0, 40, 4):
            progress("prepare weights", "", now * 100_000, 4_000_000)
        progress("wait", "process 7 on host", 0, 0)
        now += 100.0
        progress("wait", "process 7 on host", 0, 0)
    shown = ["prepare weights: 4 MB ...", *(f"prepare weights: {share} %" for share in (30, 60, 90))]
    assert capsys.readouterr().err.splitlines()[:-1] == shown


def test_nothing_is_shown_where_nothing_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar():
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("fails", [False, True])
def test_a_bar_on_a_terminal_is_cleared(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), ProgressBar() as progress:
        progress("compile", "step_t8_r1", 1, 4)
        progress("compile", "step_t16_r1", 2, 4)
        if fails:
            raise KeyboardInterrupt
    shown = terminal.getvalue()
    assert "compile" in shown
    hide, show, erase = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"
    assert shown.rindex(show) > shown.rindex(hide) and shown.endswith(erase)
