"""Times how weights are prepared, and read back into the arena: `python -m max.bench.weights [--size 349m]`.

Every line is a process of its own: seconds of preparing a float32 checkpoint, what that takes of memory at its peak
beside what the process had before, then the rate of reading the file back with the page cache warm and every chunk
checked, and the rate of a plain read of the filled arena. The last line does without huge pages.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

from ..compiler import native
from ..compiler.native_functions import Encoding
from ..models.llama_config import Config
from ..runtime.arena import Arena
from ..runtime.checkpoint import Checkpoint
from ..runtime.prepared import layout_of, load, prepare
from .random_model import SIZES, write_checkpoint

_PR_SET_THP_DISABLE = 41
_ROW = "{:<28} {:>7} {:>10} {:>10} {:>12} {:>12} {:>10}"
_HEAD = ("encoding", "MB", "prepare s", "peak MB", "load GB/s", "spread", "read GB/s")


def measure(folder: Path, encoding: Encoding, rounds: int, *, huge_pages: bool = True) -> str:
    """One line of the table, measured in this process."""
    if not huge_pages:
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    checkpoint = Checkpoint.open(folder)
    table = Config.from_hf(checkpoint.config).weights(encoding)
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        file = Path(work) / "weights"
        before, started = _peak_bytes(), time.perf_counter()
        prepare(table, checkpoint, file, threads=threads)
        prepare_s, peak = time.perf_counter() - started, _peak_bytes() - before
        rates = [_load_rate(file, threads) for _ in range(rounds)]
        arena = Arena(layout_of(table))
        load(file, arena, threads=threads)
    read_rate = max(_read_rate(arena) for _ in range(rounds))
    name = encoding if huge_pages else f"{encoding}, pages of 4 KiB"
    numbers = (f"{arena.nbytes / 1e6:,.0f}", f"{prepare_s:.2f}", f"{peak / 1e6:,.0f}")
    spread = f"{min(rates):.2f}-{max(rates):.2f}"
    return _ROW.format(name, *numbers, f"{statistics.median(rates):.2f}", spread, f"{read_rate:.1f}")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _load_rate(file: Path, threads: int) -> float:
    """GB/s into a new arena, whose pages are taken on the way, as at a start."""
    started = time.perf_counter()
    views = load(file, threads=threads)
    seconds = time.perf_counter() - started
    return sum(view.nbytes for view in views.values()) / seconds / 1e9


def _read_rate(arena: Arena) -> float:
    library = native.library()
    assert library is not None, "the kernels were not built"
    started = time.perf_counter()
    library.read(arena.memory)
    return arena.nbytes / (time.perf_counter() - started) / 1e9


def main(argv: list[str] | None = None) -> None:
    """The command line; argparse reports a wrong one."""
    parser = argparse.ArgumentParser(prog="python -m max.bench.weights", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="349m", help="number of parameters (default: 349m)")
    parser.add_argument("--rounds", type=int, default=5, help="times that a file is read back (default: 5)")
    parser.add_argument("--encoding", choices=get_args(Encoding), action="append", help="only this one")
    parser.add_argument("--checkpoint", type=Path, help="a float32 Llama to use instead of random weights")
    parser.add_argument("--in-this-process", choices=("huge", "small"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    encodings = given.encoding or get_args(Encoding)
    if given.in_this_process:
        huge_pages = given.in_this_process == "huge"
        print(measure(given.checkpoint, encodings[0], given.rounds, huge_pages=huge_pages))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = given.checkpoint or Path(work) / "model"
        if given.checkpoint is None:
            write_checkpoint(folder, given.size)
        print(_ROW.format(*_HEAD), flush=True)
        for encoding, pages in [*((each, "huge") for each in encodings), (encodings[0], "small")]:
            arguments = ["--checkpoint", str(folder), "--encoding", encoding, "--rounds", str(given.rounds)]
            command = [sys.executable, "-m", "max.bench.weights", *arguments, "--in-this-process", pages]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
