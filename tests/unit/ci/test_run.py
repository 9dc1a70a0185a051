"""What judges a change demands the kernels: tests that a machine may skip for want of a compiler run there."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_run_asks_for_every_check_and_says_that_it_judges(tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "CI=$CI $*"\n')
    make.chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name != "CI"}
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    done = subprocess.run([ROOT / ".ci" / "run"], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["CI=true", "--no-print-directory", "check", "wheel", "test"]
