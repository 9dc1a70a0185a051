"""One sequence through the step graphs of a loaded model: its most likely next tokens, and the seconds of decoding."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...compiler.limits import Limits
from ...runtime.model import Model


@dataclass
class Walk:
    """A sequence alone in row 0, with its pages in order behind page 0, which belongs to no row."""

    models: Mapping[str, Model]
    limits: Limits
    length: int = 0
    seconds: list[float] = field(default_factory=list)

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Computes the next tokens of the sequence, at most a smallest bucket; the most likely successor of each."""
        bucket = self.limits.token_buckets[0]
        assert len(tokens) <= bucket and self.length + len(tokens) <= self.limits.max_length
        rows = self.limits.logit_rows(bucket)[-1]
        step = self.models[f"step_t{bucket}_r{rows}"]
        started = time.perf_counter()
        (logits, *_) = step(*(self._inputs(tokens, bucket, rows)[spec.name] for spec in step.input_metadata))
        found = np.array(logits).argmax(axis=1)[: len(tokens)]
        self.seconds.append(time.perf_counter() - started)
        self.length += len(tokens)
        return found

    def _inputs(self, tokens: Sequence[int], bucket: int, rows: int) -> dict[str, np.ndarray]:
        limits, count = self.limits, len(tokens)
        positions = np.arange(self.length, self.length + count)
        table = np.zeros((limits.max_batch, limits.max_pages), np.int32)
        table[0] = np.arange(1, limits.max_pages + 1)
        lengths = np.zeros(limits.max_batch, np.int32)
        lengths[0] = self.length + count
        slots = table[0][positions // limits.page_tokens] * limits.page_tokens + positions % limits.page_tokens
        return {
            "tokens": _padded(tokens, bucket, 0),
            "token_src": np.full(bucket, -1, np.int32),
            "prev_ids": np.zeros(limits.max_batch, np.int32),
            "positions": _padded(positions, bucket, 0),
            "rows": _padded(np.zeros(count), bucket, -1),
            "slots": _padded(slots, bucket, 0),
            "page_table": table,
            "lengths": lengths,
            "logit_rows": np.minimum(np.arange(rows), count - 1).astype(np.int32),
        }


def _padded(values: Sequence[int] | np.ndarray, size: int, filler: int) -> np.ndarray:
    result = np.full(size, filler, np.int32)
    result[: len(values)] = values
    return result


def greedy(walk: Walk, prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that greedy decoding appends to a prompt."""
    answer = forced(walk, prompt)[-1:]
    while len(answer) < count:
        answer.append(int(walk.feed(answer[-1:])[0]))
    return answer


def forced(walk: Walk, tokens: Sequence[int]) -> list[int]:
    """The most likely successor at every position of a given text."""
    rows = walk.limits.logit_rows(walk.limits.token_buckets[0])[-1]
    found: list[int] = []
    for start in range(0, len(tokens), rows):
        found += map(int, walk.feed(tokens[start : start + rows]))
    return found
