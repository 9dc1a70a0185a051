"""`.ci/python` passes over what does not run, and says in two lines what is missing."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / ".ci" / "python"


@pytest.fixture
def find(tmp_path: Path):
    """Runs the script with nothing to find but what a test has put there."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), "PYENV_ROOT": str(tmp_path / "pyenv")}
        return subprocess.run(
            ["/bin/sh", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False
        )

    (tmp_path / "bin").mkdir()
    return run


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


RUNS = f'exec {sys.executable} "$@"'
BROKEN = "echo 'pyenv: python3.12: command not found' >&2; exit 127"


@pytest.mark.parametrize(
    "name", ["bin/python3.12", "bin/python3.13", "bin/python3", "pyenv/versions/3.12.1/bin/python"]
)
def test_finds_one_that_runs(find, tmp_path: Path, name: str) -> None:
    program(tmp_path / name, RUNS)
    assert find().stdout.strip() == sys.executable


def test_passes_over_a_shim_that_does_not_run(find, tmp_path: Path) -> None:
    program(tmp_path / "bin/python3.12", BROKEN)
    program(tmp_path / "bin/python3", RUNS)
    assert find().stdout.strip() == sys.executable


def test_asks_uv_last(find, tmp_path: Path) -> None:
    program(tmp_path / "bin/python3", BROKEN)
    installed = tmp_path / "installed"
    program(
        tmp_path / "bin/uv",
        f'case "$2" in install) echo done > {installed};; find) [ -e {installed} ] && echo {sys.executable};; esac',
    )
    assert find().stdout.strip() == sys.executable
    assert installed.exists()


def test_an_exact_version_is_not_met_by_another(find, tmp_path: Path) -> None:
    program(tmp_path / "bin/python3.9", RUNS)
    assert find("3.9").returncode == 1
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    program(tmp_path / f"bin/python{own}", RUNS)
    assert find(own).stdout.strip() == sys.executable


def test_two_lines_say_what_is_missing(find, tmp_path: Path) -> None:
    program(tmp_path / "bin/python3.12", BROKEN)
    done = find()
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert "3.12 or newer" in error
    assert "install" in hint


def test_the_script_may_be_run() -> None:
    assert os.access(SCRIPT, os.X_OK)
