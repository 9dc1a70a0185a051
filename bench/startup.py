"""How long `max` takes to start: whole processes, cold and warm, beside their bars and, if given, beside a peer.

`python -m max.bench.startup [--peer PATH] [--runs 5] [--json]`. A peer is another `max` program that takes the same
commands; it runs between our runs, so that both see the same machine. Peer figures without one are those of MAX 26.7.0
on such a machine (2 cores), quoted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from ..cache.scratch import Scratch
from .random_model import write_checkpoint
from .serve_startup import first_answer

_PROMPT = ("--prompt", "robot:", "--max-new-tokens", "16", "--temperature", "0")


@dataclass
class Row:
    """One measurement: seconds (or megabytes) of each run, the bar they are held to, and the peer's."""

    name: str
    unit: str
    bar: float
    quoted_peer: float | None = None
    values: list[float] = field(default_factory=list)
    peer_values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def peer(self) -> float | None:
        return statistics.median(self.peer_values) if self.peer_values else self.quoted_peer

    def line(self) -> str:
        spread = f"{min(self.values):.2f}-{max(self.values):.2f}"
        verdict = "meets" if self.median <= self.bar else "MISSES"
        peer = "" if self.peer is None else f"{self.peer:8.2f} {'beside' if self.peer_values else 'quoted'}"
        ratio = "" if self.peer is None else f"{self.peer / self.median:7.1f}x"
        return (
            f"{self.name:44} {self.median:8.2f} {self.unit:3} {spread:>14} {self.bar:8.2f} {verdict:7}{peer:>16}{ratio}"
        )


_HEADER = f"{'measurement':44} {'median':>8} {'':3} {'min-max':>14} {'bar':>8} {'':7}{'peer':>16}{'peer/ours':>8}"


@dataclass(frozen=True)
class _Finished:
    seconds: float
    peak_megabytes: float


def _run(program: Sequence[str], arguments: Sequence[str], cache: Path, **environ: str) -> _Finished:
    """Runs a command to its end and returns wall seconds and its peak memory; fails when it does."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [*program, *arguments],
        env={**os.environ, "MODULAR_CACHE_DIR": str(cache), **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise click.ClickException(f"{' '.join([*program, *arguments])} failed: {errors.decode()[-500:]}")
    return _Finished(seconds, usage.ru_maxrss * 1024 / 1e6)


class _Bench:
    """Runs the measurements in one folder for models and caches."""

    def __init__(self, folder: Path, runs: int, peer: str | None, report: Callable[[Row], None]) -> None:
        self.folder, self.runs, self.report = folder, runs, report
        self.ours = [sys.executable, "-m", "max"]
        self.peer = [peer] if peer else None
        self.rows: list[Row] = []
        self.warm, self.peer_warm = folder / "warm", folder / "peer"

    def measure(self, row: Row, run: Callable[[], float], peer: Callable[[], float] | None = None) -> None:
        for _ in range(self.runs):
            row.values.append(run())
            if peer is not None and self.peer is not None:
                row.peer_values.append(peer())
        self.rows.append(row)
        self.report(row)

    def help_texts(self) -> None:
        for name, arguments, peer in (
            ("max --help", ["--help"], None),
            ("max generate --help", ["generate", "--help"], 14.0),
        ):
            self.measure(
                Row(name, "s", 0.4, peer),
                lambda arguments=arguments: _run(self.ours, arguments, self.warm).seconds,
                lambda arguments=arguments: _run(self.peer or [], arguments, self.peer_warm).seconds,
            )

    def built_in(self) -> None:
        command = ["generate", *_PROMPT]

        def cold() -> float:
            with tempfile.TemporaryDirectory(dir=self.folder) as cache:
                return _run(self.ours, command, Path(cache)).seconds

        runs, self.runs = self.runs, min(self.runs, 3)
        self.measure(Row("cold compile + generate, built-in model", "s", 15, 198), cold)
        self.runs = runs
        _run(self.ours, command, self.warm)
        self.measure(
            Row("warm generate of 16 tokens, built-in model", "s", 2.0, 15),
            lambda: _run(self.ours, command, self.warm).seconds,
        )
        self.measure(
            Row("cached warm-cache, built-in model", "s", 1.0, 17),
            lambda: _run(self.ours, ["warm-cache"], self.warm).seconds,
        )
        self.measure(
            Row("warm serve to its first answer, built-in model", "s", 3.0, 23),
            lambda: first_answer(self.ours, [], self.warm),
        )

    def peer_model(self) -> None:
        """The same warm start as the peer's, on a random model of the built-in one's size."""
        if self.peer is None:
            return
        model = self.folder / "5m"
        write_checkpoint(model, "5m", "f32", 0)
        command = ["generate", "--model", str(model), *_PROMPT]
        _run(self.ours, command, self.warm)
        _run(self.peer, command, self.peer_warm)
        self.measure(
            Row("warm generate of 16 tokens, random 5 M model", "s", 2.0),
            lambda: _run(self.ours, command, self.warm).seconds,
            lambda: _run(self.peer or [], command, self.peer_warm).seconds,
        )

    def large(self) -> None:
        model = self.folder / "349m"
        write_checkpoint(model, "349m", "f32", 0)
        weights = (model / "model.safetensors").stat().st_size / 1e6
        command = ["generate", "--model", str(model), *_PROMPT]
        dump = self.folder / "ir"
        cold = _run(self.ours, command, self.warm)
        self.rows += [
            Row("cold compile + generate, 349 M model", "s", 40, None, [cold.seconds]),
            Row("its peak memory", "MB", weights * 1.25 + 600, None, [cold.peak_megabytes]),
        ]
        for row in self.rows[-2:]:
            self.report(row)
        peaks: list[float] = []

        def warm() -> float:
            finished = _run(self.ours, command, self.warm)
            peaks.append(finished.peak_megabytes)
            return finished.seconds

        self.measure(Row("warm generate of 16 tokens, 349 M model", "s", 5.0), warm)
        self.rows.append(Row("its peak memory", "MB", weights * 1.25 + 600, 4280, peaks))
        self.report(self.rows[-1])
        self.measure(
            Row("warm serve to its first answer, 349 M model", "s", 5.0),
            lambda: first_answer(self.ours, ["--model", str(model)], self.warm),
        )
        _run(self.ours, [*command, "--cache-policy", "redo"], self.warm, MODULAR_DEBUG=f"ir-output-dir={dump}")
        size = sum(file.stat().st_size for file in dump.iterdir()) / 1e6
        self.rows.append(Row("IR dump, 349 M model", "MB", 20, 392, [size]))
        self.report(self.rows[-1])


@click.command()
@click.option("--peer", help="Path of another `max` to run beside this one.")
@click.option("--runs", default=5, show_default=True, help="Runs of each measurement; the median counts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of a table.")
@click.option("--small", is_flag=True, help="Leave out the 349 M model.")
def main(peer: str | None, runs: int, as_json: bool, small: bool) -> None:
    """Measure the start of `max` and print it beside its bars."""
    if not as_json:
        click.echo(_HEADER)
    report = (lambda row: None) if as_json else (lambda row: click.echo(row.line()))
    with Scratch("bench") as scratch:
        bench = _Bench(scratch.path, runs, peer, report)
        bench.help_texts()
        bench.built_in()
        bench.peer_model()
        if not small:
            bench.large()
    if as_json:
        load = os.getloadavg()[0]
        rows = [{**asdict(row), "median": row.median} for row in bench.rows]
        click.echo(json.dumps({"cores": len(os.sched_getaffinity(0)), "load": load, "rows": rows}))


if __name__ == "__main__":
    main()
