"""The store under failing system calls: a disk full at every write, a network that hiccups at every read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.mark.skipif(_COMPILER is None, reason="there is no C compiler to make calls fail with")
@pytest.mark.slow
def test_no_failing_call_loses_or_halves_anything(tmp_path: Path) -> None:
    library = tmp_path / "faults.so"
    command = [str(_COMPILER), "-shared", "-fPIC", "-O1", "-o", str(library), str(_HERE / "faults.c"), "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(_HERE / "fault_session.py"), str(tmp_path)],
        env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout)
    assert calls["full once"] >= 20 and calls["full from then on"] >= 20, calls
    assert calls["ESTALE"] >= 20 and calls["EBUSY"] >= 20, calls
