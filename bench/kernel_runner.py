"""The kernels of a step under measurement, without engine and XLA: the bound that the engine is held to.

The weights are the prepared ones of the same model, in the arena as at a start. A step calls, for every layer, the four
matmuls and the attention, then the head's matmul and argmax; norms and residuals are left out. As the engine's do,
sequences grow by a token with every step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np

from ..compiler.native import library
from ..compiler.native_functions import Encoding
from ..models.llama_config import Config
from ..runtime import prepared
from ..runtime.arena import Arena
from ..runtime.checkpoint import Checkpoint
from .engine_runner import MAX_LENGTH, make_preparation
from .peers.protocol import Times, serve

Call = Callable[[], object]
_ROOM = 256  # tokens by which sequences may grow: 32 rounds of 8 steps


class KernelRunner:
    """Lists of calls for a shape of batch; a step makes them in order."""

    def load(self, checkpoint: Path, encoding: str, threads: int) -> str:
        kernels = library()
        assert kernels is not None, "the package was installed without kernels"
        kernels.set_num_threads(threads)
        self._kernels, self._encoding = kernels, next(name for name in get_args(Encoding) if name == encoding)
        self._config = Config.from_hf(Checkpoint.open(checkpoint).config)
        found = make_preparation(checkpoint, encoding).run()
        self._file, self._threads = found.weights.file, threads
        assert self._file is not None, "the cache keeps no prepared weights"
        self._page_dtype = found.compiled.graphs["step_t1_r1"].state[0].dtype
        self._page_tokens = found.limits.page_tokens
        self._weights = prepared.load(self._file, threads=threads)
        looked_up = () if self._config.tied else ("embed",)
        self._packed = [
            weight for name, weight in self._weights.items() if weight.dtype == np.uint8 and name not in looked_up
        ]
        return f"{kernels.isa}, {threads} threads, keys and values {self._page_dtype}"

    def open(self, batch: int, context: int) -> list[int]:
        self._matmuls, self._attentions, self._last = self._step(batch, batch, 1, context)
        return []

    def _step(self, rows: int, logits: int, new: int, context: int) -> tuple[list[list[Call]], list[Call], list[Call]]:
        """Per layer its matmuls and its attention; then what follows the last layer.

        Behind its attention the last layer is of the rows that give logits, as in the engine's long steps.
        """
        config, tokens = self._config, rows * new
        d, f, q, kv = config.hidden_size, config.intermediate_size, config.query_width, config.kv_width
        random = np.random.default_rng(0)

        def values(count: int, width: int) -> np.ndarray:
            return random.standard_normal((count, width), np.float32)

        x, qkv, attended, mlp = (values(tokens, width) for width in (d, q + 2 * kv, q, f))
        y, scores = np.empty_like(x), np.empty((logits, config.vocab_size), np.float32)
        matmuls = [
            [
                self._matmul(x, f"blocks.{layer}.qkv", qkv),
                self._matmul(attended[:left], f"blocks.{layer}.o", y[:left]),
                self._matmul(x[:left], f"blocks.{layer}.gate_up", mlp[:left], gated=True),
                self._matmul(mlp[:left], f"blocks.{layer}.down", y[:left]),
            ]
            for layer, left in enumerate([tokens] * (config.num_layers - 1) + [logits])
        ]
        head = self._matmul(np.ascontiguousarray(x[:logits]), "embed" if config.tied else "head", scores)
        last = [head, lambda: self._kernels.argmax(scores)]
        return matmuls, self._attention(qkv, attended, rows, new, context), last

    def _matmul(self, x: np.ndarray, weight: str, y: np.ndarray, gated: bool = False) -> Call:
        epilogue = "swiglu" if gated else "none"
        return self._kernels.matmul_call(x, self._weights[weight], y, self._encoding, epilogue=epilogue)

    def _attention(self, qkv: np.ndarray, out: np.ndarray, rows: int, new: int, context: int) -> list[Call]:
        config, page = self._config, self._page_tokens
        per_row = -(-min(context + _ROOM, MAX_LENGTH) // page)
        shape = (1 + rows * per_row, 2, config.num_kv_heads, page, config.head_dim)
        pages = Arena((f"{layer}", shape, self._page_dtype) for layer in range(config.num_layers)).views().values()
        for layer in pages:
            layer[:] = 0.1
        table = np.zeros((rows, -(-MAX_LENGTH // page)), np.int32)
        table[:, :per_row] = 1 + np.arange(rows * per_row).reshape(rows, per_row)
        row = np.repeat(np.arange(rows, dtype=np.int32), new)
        position = np.tile(np.arange(context - new, context, dtype=np.int32), rows)
        slot = table[row, position // page] * page + position % page
        cos, sin = (np.full((len(row), config.head_dim // 2), value, np.float32) for value in (1, 0))
        scale = config.head_dim**-0.5

        def grow() -> None:
            position[:] += 1
            slot[:] = table[row, position // page] * page + position % page

        self._grow = grow
        return [
            self._kernels.attention_call(qkv, cos, sin, layer, table, row, position, slot, out, scale=scale)
            for layer in pages
        ]

    def _run(self, steps: int, calls: list[Call], then: Call = lambda: None) -> Times:
        def step() -> None:
            for call in calls:
                call()

        times = Times()
        for _ in range(steps):
            times.add(step)
            then()
        return times

    def _whole(self) -> list[Call]:
        qkv_first = [[qkv, attend, *rest] for (qkv, *rest), attend in zip(self._matmuls, self._attentions, strict=True)]
        return [*(call for layer in qkv_first for call in layer), *self._last]

    def decode(self, steps: int) -> Times:
        return self._run(steps, self._whole(), self._grow)

    def matmuls(self, steps: int) -> Times:
        """The matmuls of a step alone."""
        return self._run(steps, [*(call for layer in self._matmuls for call in layer), self._last[0]])

    def attention(self, steps: int) -> Times:
        """The attention of a step alone, over all layers."""
        return self._run(steps, list(self._attentions))

    def read(self, steps: int) -> Times:
        """A plain read, by one thread, of the weights that the matmuls of a step read."""
        return self._run(steps, [lambda weight=weight: self._kernels.read(weight) for weight in self._packed])

    def prefill(self, tokens: int) -> Times:
        self._matmuls, self._attentions, self._last = self._step(1, 1, tokens, tokens)
        return self._run(1, self._whole())

    def fill_arena(self, steps: int) -> Times:
        """Reads the prepared weights into a new arena, checks on; the page cache has the file by now."""
        file, times = self._file, Times()
        assert file is not None
        for _ in range(steps):
            times.add(lambda: prepared.load(file, threads=self._threads))
        return times

    def close(self) -> None:
        """Nothing is open that would not end with the process."""

    def weight_bytes(self) -> int:
        """The size of the prepared weights."""
        return sum(weight.nbytes for weight in self._weights.values())


if __name__ == "__main__":
    serve(KernelRunner)
