"""llama.cpp under measurement, through the C functions of llama-cpp-python.

Default settings but for these: n_batch = n_ubatch = 512, and a context that just holds what is measured. So keys and
values are float16, flash attention is left to llama.cpp, and weights are repacked where it has a layout for them.
Quantized models are made from the float32 file beside the checkpoint, all matrices in one encoding ("pure"), as ours.
"""

# The peer is installed in an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as llama
import numpy as np

from .protocol import Times, prompt, serve

_BATCH_TOKENS = 512
_ROOM = 512  # tokens that a sequence may grow by
_FILE_TYPES = {
    "q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k": llama.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "q6_k": llama.LLAMA_FTYPE_MOSTLY_Q6_K,
}
_SILENT = llama.llama_log_callback(lambda level, text, data: None)


class LlamaCppRunner:
    """One model, and a context for each shape of batch."""

    def __init__(self) -> None:
        self._context: Any = None
        self._seed = 0

    def load(self, checkpoint: Path, encoding: str, threads: int) -> str:
        file = _quantized(checkpoint, encoding)
        llama.llama_log_set(_SILENT, None)
        llama.llama_backend_init()
        parameters = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(str(file).encode(), parameters)
        assert self._model, f"{file} cannot be loaded"
        self._threads = threads
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(_BATCH_TOKENS, 0, 1)
        return f"llama-cpp-python {llama_cpp.__version__}, {threads} threads, {file.name}; keys and values float16"

    def _use_context(self, sequences: int, tokens: int) -> None:
        """Makes the context anew when it has another size; empties it otherwise."""
        if self._context is not None and self._size == (sequences, tokens):
            llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
            return
        self.close()
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = sequences * tokens
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = _BATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context, self._size = llama.llama_init_from_model(self._model, parameters), (sequences, tokens)
        assert self._context, "llama.cpp makes no context"

    def _compute(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """One batch of (token, position, sequence, wants logits); the likeliest next tokens of those that want them."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert llama.llama_decode(self._context, batch) == 0, "llama_decode fails"
        return [self._likeliest(i) for i, row in enumerate(rows) if row[3]]

    def _likeliest(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _prompt(self, sequence: int, tokens: int) -> int:
        self._seed += 1
        ids = prompt(self._seed, tokens, self._vocab_size)
        last = -1
        for start in range(0, tokens, _BATCH_TOKENS):
            chunk = range(start, min(start + _BATCH_TOKENS, tokens))
            found = self._compute([(ids[at], at, sequence, at == tokens - 1) for at in chunk])
            last = found[0] if found else last
        return last

    def open(self, batch: int, context: int) -> list[int]:
        self._use_context(batch, context + _ROOM)
        self._tokens = [self._prompt(sequence, context) for sequence in range(batch)]
        self._position = context
        first = list(self._tokens)
        self._step()
        return first

    def _step(self) -> None:
        self._tokens = self._compute([(token, self._position, i, True) for i, token in enumerate(self._tokens)])
        self._position += 1

    def decode(self, steps: int) -> Times:
        times = Times()
        for _ in range(steps):
            times.add(self._step)
        return times

    def close(self) -> None:
        if self._context is not None:
            llama.llama_free(self._context)
            self._context = None

    def prefill(self, tokens: int) -> Times:
        self._use_context(1, tokens + _ROOM)
        times = Times()
        times.add(lambda: self._prompt(0, tokens))
        return times


def _quantized(checkpoint: Path, encoding: str) -> Path:
    """The model in this encoding, made from the float32 one if it is not there."""
    folder = checkpoint / "llama.cpp"
    file = folder / f"{encoding}.gguf"
    if not file.exists():
        parameters = llama.llama_model_quantize_default_params()
        parameters.ftype, parameters.pure, parameters.nthread = _FILE_TYPES[encoding], True, 2
        source, unfinished = folder / "float32.gguf", file.with_suffix(".part")
        failed = llama.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(parameters))
        assert not failed, f"llama.cpp cannot quantize to {encoding}"
        unfinished.rename(file)
    return file


if __name__ == "__main__":
    serve(LlamaCppRunner)
