"""Compiles for a target in a process of its own, so that its platform, its flags and a crash of it stay there."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from .. import CompileError
from ..cache.scratch import Scratch
from .compile_messages import Answer, Job, Start, receive, send
from .counters import COUNTERS
from .targets import Target, toolchain

logger = logging.getLogger(__name__)

# libtpu looks for a host of Google's cloud otherwise, and waits for one.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


class CompileProcess:
    """One compile process; `compiling` starts and ends it."""

    def __init__(self, target: Target, process: subprocess.Popen[bytes], answers: BinaryIO, log: BinaryIO) -> None:
        self._target, self._process, self._answers, self._log = target, process, answers, log
        self._waiting: dict[str, None] = {}

    def submit(self, job: Job) -> None:
        """Hands over a job; it may be compiled beside others."""
        self._waiting[job.name] = None
        self._send(job)

    def answers(self) -> Iterator[Answer]:
        """The answers to all jobs so far, in the order in which they come. Raises CompileError for one that failed."""
        while self._waiting:
            yield self.answer()

    def answer(self) -> Answer:
        """The next answer. Raises CompileError for a job that failed, and when the process has died."""
        found = receive(self._answers, Answer)
        if found is None:
            raise self._died()
        if found.error is not None:
            raise CompileError(*found.error)
        del self._waiting[found.name]
        COUNTERS.compiled += 1
        return found

    def _send(self, message: Start | Job) -> None:
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, message)  # type: ignore[arg-type]
        except BrokenPipeError:
            # It may have said why before it ended.
            self.answer()

    def _died(self) -> CompileError:
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._log.seek(0)
        words = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        for line in words:
            logger.debug("compile process: %s", line)
        doing = ", ".join(list(self._waiting)[:3]) + (", ..." if len(self._waiting) > 3 else "")
        said = f" Its last words: {words[-1][:200]}" if words else ""
        return CompileError(
            f"the compile process for {self._target.name} {how}; left to do: {doing or 'nothing'}",
            f"Run the command again; nothing half-done was kept.{said}",
        )


@contextmanager
def compiling(target: Target, threads: int, *, on_device: bool = False) -> Iterator[CompileProcess]:
    """A compile process for a target, which ends with the block. Raises ConfigError where the toolchain is missing.

    on_device: compile with a device of this host at hand, which XLA then measures kernels on
    """
    toolchain.require(target)
    read, write = os.pipe()
    with tempfile.TemporaryFile() as log, Scratch("compile") as scratch:
        # The child finds this very package, wherever the parent found it.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        command = [sys.executable, "-P", "-m", "max.compiler.compile_worker", str(write), str(scratch.path)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(write,),
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
        )
        os.close(write)
        try:
            with os.fdopen(read, "rb") as answers:
                running = CompileProcess(target, process, answers, log)  # type: ignore[arg-type]
                running._send(Start(target.name, threads, on_device))
                yield running
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                try:
                    process.stdin.close()
                except BrokenPipeError:
                    logger.debug("the compile process had ended before it read everything")
