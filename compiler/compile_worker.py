"""The compile process, `python -m max.compiler.compile_worker FD FOLDER`: compiles what stdin says, answers on FD.

Plugins, their flags and their crashes stay in here. When stdin ends, the parent has what it wants or has died: the
process ends at once, whatever it is doing. FOLDER is the parent's, for files; where the parent was killed, nobody else
is there to remove it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from .. import MaxError
from .compile_messages import Answer, Job, Start, receive, send
from .targets import Target
from .xla_targets import DeviceCompiler, TargetCompiler


def main() -> None:
    """Serves one parent until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    jobs, answers = sys.stdin.buffer, os.fdopen(int(sys.argv[1]), "wb")
    folder = Path(sys.argv[2])
    try:
        _serve(jobs, answers, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # plugins may wait for their own threads for ever


def _serve(jobs: BinaryIO, answers: BinaryIO, folder: Path) -> None:
    start = receive(jobs, Start)
    if start is None:
        return
    lock = threading.Lock()

    def answer(message: Answer) -> None:
        with lock:
            send(answers, message)

    try:
        target = Target.parse(start.target)
        compiler = DeviceCompiler(target) if start.on_device else TargetCompiler(target, folder)
    except MaxError as error:
        answer(Answer("", (error.message, error.hint)))
        return
    pool = ThreadPoolExecutor(start.threads, thread_name_prefix="compile")
    while (job := receive(jobs, Job)) is not None:
        pool.submit(lambda job=job: answer(_compile(compiler, job)))
    pool.shutdown(wait=False, cancel_futures=True)


def _compile(compiler: TargetCompiler | DeviceCompiler, job: Job) -> Answer:
    started = time.perf_counter()
    try:
        found = compiler.compile(job.module, job.name, job.options, job.dump_to)
    except MaxError as error:
        return Answer(job.name, (error.message, error.hint))
    except Exception as error:  # whatever it is, the parent waits for an answer
        return Answer(job.name, (f"compiling {job.name} failed: {error!r}", "This is a defect of the compiler."))
    seconds = time.perf_counter() - started
    return Answer(
        job.name, None, found.executable, found.flops, found.bytes_accessed, found.memory, found.optimized_hlo, seconds
    )


if __name__ == "__main__":
    main()
