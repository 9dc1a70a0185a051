"""What is measured beside other engines, and the ratios that are wanted: data alone.

A ratio is the seconds of one series by those of another in the same round. Series: "ours" is the engine, "kernels" the
kernels of its step, "matmuls" and "attention" their parts, "read" a plain read of the matmuls' weights.
"""

from __future__ import annotations

from dataclasses import dataclass

ENCODINGS = ("float32", "bfloat16", "q8_0", "q4_0", "q4_k")
OURS, LLAMA_CPP, OPENVINO = "ours", "llama.cpp", "openvino"
KERNELS, MATMULS, ATTENTION, READ = "kernels", "matmuls", "attention", "read"
FILL, TWO_GIGABYTES_A_SECOND = "fill", "2 GB/s"


@dataclass(frozen=True)
class Task:
    """One thing to do in every round: decoding steps of `batch` sequences behind `context` tokens, or a prompt."""

    name: str
    batch: int
    context: int
    series: tuple[str, ...]

    @property
    def is_prefill(self) -> bool:
        return self.batch == 0


TASKS = {
    task.name: task
    for task in (
        Task("b1", 1, 64, (OURS, LLAMA_CPP, OPENVINO, KERNELS, MATMULS, READ)),
        Task("b8", 8, 64, (OURS, LLAMA_CPP, OPENVINO, KERNELS)),
        Task("prefill512", 0, 512, (OURS, LLAMA_CPP, OPENVINO, KERNELS)),
        Task("context4096", 1, 4096, (OURS, LLAMA_CPP, KERNELS, ATTENTION)),
        Task("load", 1, 64, (FILL,)),
    )
}
CONTEXT_ENCODINGS = ("bfloat16",)
"""The encodings for which `context4096` is measured."""


@dataclass(frozen=True)
class Bar:
    """seconds(`of`) / seconds(`by`), per round; its median is to be at least `least`, where that is not None."""

    task: str
    encoding: str
    threads: int
    of: str
    by: str
    least: float | None = None


def _bars() -> tuple[Bar, ...]:
    bars: list[Bar] = []

    def add(task: str, of: str, by: str, least: dict[str, float | None], threads: tuple[int, ...] = (1, 2)) -> None:
        bars.extend(Bar(task, name, count, of, by, ratio) for name, ratio in least.items() for count in threads)

    def each(ratio: float | None) -> dict[str, float | None]:
        return dict.fromkeys(ENCODINGS, ratio)

    add("b1", LLAMA_CPP, OURS, {"float32": 1.5, "bfloat16": 1.3, "q8_0": 1.4, "q4_0": 1.25, "q4_k": 1.1}, (1,))
    add("b1", LLAMA_CPP, OURS, each(1.0), (2,))
    add("b1", OPENVINO, OURS, each(None))
    add("b8", LLAMA_CPP, OURS, each(2.0))
    add("b8", OPENVINO, OURS, each(1.1) | {"bfloat16": 1.3})
    prefill = {"float32": 1.3, "bfloat16": 1.3, "q8_0": 2.0, "q4_0": 2.0, "q4_k": None}
    add("prefill512", LLAMA_CPP, OURS, prefill)
    add("prefill512", OPENVINO, OURS, each(1.05))
    add("context4096", LLAMA_CPP, OURS, dict.fromkeys(CONTEXT_ENCODINGS, 1.1))
    add("context4096", ATTENTION, KERNELS, dict.fromkeys(CONTEXT_ENCODINGS))
    stream = {"float32": 0.9, "bfloat16": 0.9, "q8_0": 0.75, "q4_0": 0.75, "q4_k": None}
    add("b1", READ, MATMULS, stream, (1,))
    for task in ("b1", "b8"):
        add(task, KERNELS, OURS, each(0.9))
    add("prefill512", KERNELS, OURS, each(None))
    add("context4096", KERNELS, OURS, dict.fromkeys(CONTEXT_ENCODINGS, 0.9))
    add("load", TWO_GIGABYTES_A_SECOND, FILL, {"float32": 1.0})
    return tuple(bars)


BARS = _bars()
