"""How fast the CPU kernels are: each beside a plain read of the same memory, and beside numpy.

`python -m max.bench.kernels [--threads 1] [--isa avx2] [--part sampling] [--json]`. With one thread the process is
pinned and its CPU time is taken, which neighbours on the machine disturb least; with more it is wall time. Weights lie
in the arena.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import get_args

import click
import ml_dtypes
import numpy as np

from .. import ConfigError
from ..compiler.native import Library, library
from ..compiler.native_functions import Encoding
from ..compiler.sampling import mask_words
from ..runtime.arena import Arena

_INPUTS, _OUTPUTS, _LAYERS = 1024, 2816, 24  # gate and up of a model of 350 M
_UNCACHED_BYTES = 192 << 20  # more than a third-level cache keeps
_ROWS = (1, 2, 4, 8, 12, 16, 32, 128, 512)
_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE_TOKENS = 16, 8, 64, 64
_PARTS = ("matmul", "sampling", "attention")
_STEPS = ((1, 1, 64), (8, 1, 64), (1, 1, 1024), (1, 1, 8192), (8, 1, 8192), (1, 512, 512), (1, 512, 4096))
"""Rows, tokens of each in the step, tokens of context."""


@dataclass(frozen=True)
class Row:
    """One measurement: medians over all layers; `of_read` is its share of the speed of a plain read."""

    name: str
    microseconds: float
    gigabytes_per_s: float
    gigaflops: float
    of_read: float

    def line(self) -> str:
        speeds = f"{self.gigabytes_per_s:9.1f} {self.gigaflops:9.0f}"
        return f"{self.name:36} {self.microseconds:10.0f} {speeds} {self.of_read:9.2f}"


_HEADER = f"{'kernel':36} {'us':>10} {'GB/s':>9} {'GFLOP/s':>9} {'of read':>9}"


class Bench:
    """Times calls, each over all layers in turn."""

    def __init__(self, kernels: Library, runs: int) -> None:
        self.kernels, self.runs = kernels, runs
        self.clock = time.process_time if kernels.num_threads == 1 else time.perf_counter

    def seconds(self, calls: list[Callable[[], object]]) -> float:
        """The median over the runs of the mean per call."""
        times: list[float] = []
        for _ in range(self.runs + 1):
            started = self.clock()
            for call in calls:
                call()
            times.append((self.clock() - started) / len(calls))
        return statistics.median(times[1:])

    def row(self, name: str, calls: list[Callable[[], object]], nbytes: int, flops: int, read: float) -> Row:
        taken = self.seconds(calls)
        return Row(name, taken * 1e6, nbytes / taken / 1e9, flops / taken / 1e9, read / taken)

    def matmuls(self, encoding: Encoding) -> list[Row]:
        """One row per number of rows, behind the plain read of the packed weights."""
        nbytes = self.kernels.packed_bytes(encoding, _INPUTS, _OUTPUTS)
        num_layers = max(_LAYERS, _UNCACHED_BYTES // nbytes)
        layers = list(Arena((f"{i}", (nbytes,), "uint8") for i in range(num_layers)).views().values())
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((_INPUTS, _OUTPUTS), np.float32)
        self.kernels.pack(weights, layers[0], encoding)
        for layer in layers[1:]:
            layer[:] = layers[0]
        read = self.seconds([lambda layer=layer: self.kernels.read(layer) for layer in layers])
        rows = [Row(f"read {encoding} weights, 1 thread", read * 1e6, nbytes / read / 1e9, 0, 1)]
        for count in _ROWS:
            x, y = rng.standard_normal((count, _INPUTS), np.float32), np.empty((count, _OUTPUTS), np.float32)

            def call(layer: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> None:
                self.kernels.matmul(x, layer, y, encoding)

            some = layers if count < 128 else layers[:4]
            calls: list[Callable[[], object]] = [lambda layer=layer, call=call: call(layer) for layer in some]
            rows.append(self.row(f"matmul {encoding} M={count}", calls, nbytes, 2 * count * _INPUTS * _OUTPUTS, read))
        return rows

    def numpy_matmul(self) -> Row:
        rng = np.random.default_rng(0)
        x, w = rng.standard_normal((512, _INPUTS), np.float32), rng.standard_normal((_INPUTS, _OUTPUTS), np.float32)
        return self.row("numpy float32 M=512, its own threads", [lambda: x @ w], w.nbytes, 2 * x.size * _OUTPUTS, 0)

    def argmax(self, rows: int, vocabulary: int) -> Row:
        """Greedy sampling; its logits come from the cache, where the step has left them."""
        x = np.random.default_rng(0).standard_normal((rows, vocabulary), np.float32)
        read = self.seconds([lambda: self.kernels.read(x)] * 20)
        return self.row(f"argmax {rows} x {vocabulary}", [lambda: self.kernels.argmax(x)] * 20, x.nbytes, x.size, read)

    def samplers(self, rows: int, vocabulary: int) -> list[Row]:
        """Drawing with different settings, and log probabilities; logits come from the cache as in `argmax`."""
        rng = np.random.default_rng(0)
        x = (3 * rng.standard_normal((rows, vocabulary))).astype(np.float32)
        read = self.seconds([lambda: self.kernels.read(x)] * 20)
        mask = np.full((rows, mask_words(vocabulary)), -1, np.int32)
        nothing = np.zeros((1, vocabulary), np.int32), np.zeros((1, vocabulary), np.float32)
        measured = []
        for name, top_k, top_p in (("all", 0, 1.0), ("top-k 50", 50, 1.0), ("top-k 255", 255, 1.0), ("top-p", 0, 0.95),
                                   ("top-k 50, top-p", 50, 0.95)):  # fmt: skip
            settings = np.tile(np.array([1, top_p, 0, 1, 0, 0], np.float32), (rows, 1))
            numbers = np.tile(np.array([top_k, 1, 2, 3, -1], np.int32), (rows, 1))
            inputs = (x, mask, *nothing, settings, numbers)
            calls: list[Callable[[], object]] = [lambda inputs=inputs: self.kernels.sample(*inputs)] * 20
            measured.append(self.row(f"sample {rows} x {vocabulary}, {name}", calls, x.nbytes, x.size, read))
        ids = np.zeros(rows, np.int32)
        calls = [lambda: self.kernels.logprobs(x, ids, 20)] * 20
        return [*measured, self.row(f"log probabilities {rows} x {vocabulary}", calls, x.nbytes, x.size, read)]

    def attention(self, dtype: type, rows: int, new: int, context: int) -> Row:
        """Steps of `rows` rows with `new` tokens each, the last of `context`, over pages of several layers."""
        per_row = -(-context // _PAGE_TOKENS)
        shape = (1 + rows * per_row, 2, _KV_HEADS, _PAGE_TOKENS, _HEAD_DIM)
        layers = max(1, min(_LAYERS, (256 << 20) // (int(np.prod(shape)) * np.dtype(dtype).itemsize)))
        pages = list(Arena((f"{i}", shape, np.dtype(dtype).name) for i in range(layers)).views().values())
        rng = np.random.default_rng(0)
        for layer in pages:
            layer[:] = rng.standard_normal(shape[1:], np.float32).astype(dtype)
        table = (1 + np.arange(rows * per_row, dtype=np.int32)).reshape(rows, per_row)
        row = np.repeat(np.arange(rows, dtype=np.int32), new)
        position = np.tile(np.arange(context - new, context, dtype=np.int32), rows)
        slot = table[row, position // _PAGE_TOKENS] * _PAGE_TOKENS + position % _PAGE_TOKENS
        qkv = rng.standard_normal((len(row), (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM), np.float32)
        cos, sin = np.ones((len(row), _HEAD_DIM // 2), np.float32), np.zeros((len(row), _HEAD_DIM // 2), np.float32)
        out = np.empty((len(row), _HEADS * _HEAD_DIM), np.float32)
        scale = _HEAD_DIM**-0.5

        def call(layer: np.ndarray) -> None:
            self.kernels.attention(qkv, cos, sin, layer, table, row, position, slot, out, scale=scale)

        # Rows of decode are the share of pages that is read once; a prompt reads them once per tile.
        nbytes = rows * context * 2 * _KV_HEADS * _HEAD_DIM * np.dtype(dtype).itemsize
        flops = 4 * _HEADS * _HEAD_DIM * int(np.sum(position.astype(np.int64) + 1))
        read = self.seconds([lambda layer=layer: self.kernels.read(layer) for layer in pages])
        name = f"attention {np.dtype(dtype).name} {rows} x {new} of {context}"
        return self.row(name, [lambda layer=layer: call(layer) for layer in pages], nbytes, flops, read)


@click.command(help=__doc__)
@click.option("--threads", default=1, show_default=True, help="Threads of the kernels; 0 for the CPUs of the process.")
@click.option("--isa", default="", help="Instruction set; the best of the CPU if not given.")
@click.option("--part", type=click.Choice(_PARTS), help="Measure only these; all if not given.")
@click.option("--runs", default=7, show_default=True, help="Runs of each measurement, of which the median is taken.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
def main(threads: int, isa: str, part: str | None, runs: int, as_json: bool) -> None:
    kernels = library()
    if kernels is None:
        raise click.ClickException("the package was installed without a C++ compiler, so there are no kernels")
    try:
        kernels.select(isa)
    except ConfigError as error:
        raise click.ClickException(f"{error.message}\n{error.hint}") from error
    kernels.set_num_threads(threads)
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    bench = Bench(kernels, runs)
    if not as_json:
        click.echo(f"{kernels.isa}, {kernels.num_threads} threads\n{_HEADER}")

    def show(row: Row) -> None:
        click.echo(json.dumps({"isa": kernels.isa, "threads": threads, **asdict(row)}) if as_json else row.line())

    for each in _PARTS if part is None else (part,):
        for row in _rows(bench, each):
            show(row)


def _rows(bench: Bench, part: str) -> Iterator[Row]:
    if part == "matmul":
        for encoding in get_args(Encoding):
            yield from bench.matmuls(encoding)
        yield bench.numpy_matmul()
    elif part == "sampling":
        yield bench.argmax(8, 32_000)
        for shape in ((8, 32_000), (1, 256_000)):
            yield from bench.samplers(*shape)
    else:
        for dtype in (np.float32, ml_dtypes.bfloat16):
            for step in _STEPS:
                yield bench.attention(dtype, *step)


if __name__ == "__main__":
    main()
