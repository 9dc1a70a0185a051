"""An engine under measurement as a process of its own that does what it is told, one command at a time."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import MaxError
from ..cache.scratch import Scratch
from .peers.protocol import Times

_PACKAGE = Path(__file__).resolve().parent.parent


class MeasuredProcess:
    """Runs a module of this package under a Python that need not have it installed; `close` ends it."""

    def __init__(self, python: Path, module: str, cpus: list[int]) -> None:
        """cpus: those that the process may run on."""
        self._name = module
        # The folder holds this package alone, so that nothing else of our environment is found from another.
        self._scratch = Scratch("bench")
        (self._scratch.path / "max").symlink_to(_PACKAGE)
        self._process = subprocess.Popen(
            [str(python), "-W", "ignore", "-m", f"max.bench.{module}", ",".join(map(str, cpus))],
            env={**os.environ, "PYTHONPATH": str(self._scratch.path)},
            cwd=self._scratch.path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def do(self, command: str, **arguments: Any) -> Any:
        """The answer to a command; raises MaxError when the process has ended instead, having said why on stderr."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": command, "with": arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise MaxError(f"{self._name} ended at {command} {arguments}", "What it printed before says why.")
        return json.loads(answer)

    def time(self, command: str, **arguments: Any) -> Times:
        """`do` for a command that is answered with times."""
        return Times(**self.do(command, **arguments))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._scratch.remove()
