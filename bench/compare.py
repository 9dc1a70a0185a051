"""How fast the engine is beside llama.cpp and OpenVINO GenAI: `python -m max.bench.compare --peers DIR`.

A random Llama of 349 M parameters is run by each engine in a process of its own. They take turns: in every round each
computes some steps, so that all see the same machine. With one thread the process is pinned to a CPU and its own time
counts, with two it is the clock's. bench/README.md says how to make DIR and how to read the table. A run can be cut
into slices, which are kept in --results until measured again.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

import click

from .. import MaxError
from . import bars
from .bars import ATTENTION, FILL, KERNELS, LLAMA_CPP, MATMULS, OPENVINO, OURS, READ, TASKS, Task
from .comparison_table import lines
from .gguf_export import write_gguf
from .measured_process import MeasuredProcess
from .random_model import write_checkpoint
from .rounds import Turn, Turns

_STEPS = 8
_MODULES = {
    OURS: "engine_runner",
    KERNELS: "kernel_runner",
    LLAMA_CPP: "peers.llama_cpp_runner",
    OPENVINO: "peers.openvino_runner",
}
_PEERS = {LLAMA_CPP: "llama/bin/python", OPENVINO: "openvino/bin/python"}
_OF_KERNELS = {KERNELS: "decode", MATMULS: "matmuls", ATTENTION: "attention", READ: "read", FILL: "fill_arena"}
"""Series that the kernels' process measures, and the commands for them."""


def prepare_models(folder: Path, encodings: tuple[str, ...]) -> Path:
    """Writes the checkpoint and the files of llama.cpp that are not there yet; returns the checkpoint."""
    checkpoint = folder / "models" / "349m"
    if not (checkpoint / "model.safetensors").exists():
        write_checkpoint(checkpoint, "349m", "f32", 0, max_position=8192)
    files = checkpoint / "llama.cpp"
    files.mkdir(exist_ok=True)
    for name, type_name in (("float32", "f32"), ("bfloat16", "bf16")):
        if not (files / f"{name}.gguf").exists() and (name == "float32" or name in encodings):
            write_gguf(checkpoint, files / "unfinished", type_name)
            (files / "unfinished").rename(files / f"{name}.gguf")
    return checkpoint


class Comparison:
    """The engines of one encoding and number of threads, each loaded once."""

    def __init__(self, folder: Path, checkpoint: Path, encoding: str, threads: int, series: set[str]) -> None:
        self.encoding, self.threads = encoding, threads
        cpus = sorted(os.sched_getaffinity(0))[-threads:]
        if len(cpus) < threads:
            raise MaxError(f"{threads} threads need as many CPUs", "Measure with --threads 1.")
        self._processes: dict[str, MeasuredProcess] = {}
        for name in sorted({KERNELS if each in _OF_KERNELS else each for each in series}):
            python = folder / _PEERS[name] if name in _PEERS else Path(sys.executable)
            process = self._processes[name] = MeasuredProcess(python, _MODULES[name], cpus)
            settings = process.do("load", checkpoint=str(checkpoint), encoding=encoding, threads=threads)
            click.echo(f"{name}: {settings}", err=True)

    def close(self) -> None:
        for process in self._processes.values():
            process.close()

    def measure(self, task: Task, rounds: int) -> Turns:
        """The turns of all series in so many rounds."""
        if not task.is_prefill and task.name != "load":
            self._open(task)
        turns: list[Turn] = []
        for at in range(rounds + 1):
            for series in task.series:
                wall, cpu = self._turn(task, series)
                if at:  # the first round warms up
                    turns.append(Turn(task.name, self.encoding, self.threads, series, at, wall, cpu))
        if task.name == "load":
            seconds = self._processes[KERNELS].do("weight_bytes") / 2e9
            turns += [
                Turn(task.name, self.encoding, self.threads, bars.TWO_GIGABYTES_A_SECOND, at + 1, seconds, seconds)
                for at in range(rounds)
            ]
        return Turns(turns)

    def _open(self, task: Task) -> None:
        first = {
            name: process.do("open", batch=task.batch, context=task.context)
            for name, process in self._processes.items()
            if name in task.series
        }
        if self.encoding == "float32" and len({tuple(ids) for name, ids in first.items() if name != KERNELS}) > 1:
            raise MaxError(f"the engines do not run the same model: {first}", "Write the models anew.")

    def _turn(self, task: Task, series: str) -> tuple[float, float]:
        if series in _OF_KERNELS and not (task.is_prefill and series == KERNELS):
            times = self._processes[KERNELS].time(_OF_KERNELS[series], steps=1 if series == FILL else _STEPS)
        elif task.is_prefill:
            times = self._processes[series].time("prefill", tokens=task.context)
        else:
            times = self._processes[series].time("decode", steps=_STEPS)
        return statistics.median(times.wall), statistics.median(times.cpu)


def _chosen(given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(given.split(",")) if given else known
    wrong = [name for name in names if name not in known]
    if wrong:
        raise click.BadParameter(f"{', '.join(wrong)}; there are {', '.join(known)}")
    return names


@click.command(help=__doc__)
@click.option("--peers", "folder", type=Path, default=Path("build/peers"), show_default=True,
              help="Folder of the peers' environments, `llama` and `openvino`, and of the models.")  # fmt: skip
@click.option("--cells", default="", help=f"What to measure, separated by commas: {', '.join(TASKS)}.")
@click.option("--encodings", default="", help=f"Of {', '.join(bars.ENCODINGS)}.")
@click.option("--threads", default="1,2", show_default=True, help="Numbers of threads.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of each measurement, after one that warms up.")
@click.option("--results", type=Path, default=Path("build/peers/turns.json"), show_default=True,
              help="File of all turns; those measured now replace those of the same cells.")  # fmt: skip
@click.option("--table", "table_only", is_flag=True, help="Measure nothing; print the table of --results.")
def main(folder: Path, cells: str, encodings: str, threads: str, rounds: int, results: Path, table_only: bool) -> None:
    chosen = _chosen(encodings, bars.ENCODINGS)
    counts = [int(count) for count in _chosen(threads, ("1", "2"))]
    tasks = [TASKS[name] for name in _chosen(cells, tuple(TASKS))]
    try:
        if not table_only:
            _measure(folder, chosen, counts, tasks, rounds, results)
    except MaxError as error:
        raise click.ClickException(f"{error.message}\n{error.hint}") from error
    for line in lines(Turns.read(results)):
        click.echo(line)


def _measure(
    folder: Path, encodings: tuple[str, ...], counts: list[int], tasks: list[Task], rounds: int, results: Path
) -> None:
    for python in sorted({folder / _PEERS[name] for task in tasks for name in task.series if name in _PEERS}):
        if not python.exists():
            raise MaxError(f"there is no {python}", "Make the environments of the peers: bench/README.md says how.")
    checkpoint = prepare_models(folder, encodings)
    for encoding in encodings:
        for threads in counts:
            wanted = [task for task in tasks if any(_is(bar, task, encoding, threads) for bar in bars.BARS)]
            if not wanted:
                continue
            comparison = Comparison(
                folder, checkpoint, encoding, threads, {series for task in wanted for series in task.series}
            )
            try:
                for task in wanted:
                    Turns.read(results).replace(comparison.measure(task, rounds)).write(results)
            finally:
                comparison.close()


def _is(bar: bars.Bar, task: Task, encoding: str, threads: int) -> bool:
    return (bar.task, bar.encoding, bar.threads) == (task.name, encoding, threads)


if __name__ == "__main__":
    main()
