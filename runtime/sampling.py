"""How a request's tokens are chosen: the parameters, and their rows in the sampler graphs' inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .. import RequestError
from ..compiler import xla
from .model import Buffer, Model

_SEED_LIMIT = 1 << 64
_LEAST_TEMPERATURE = 1e-30  # a smaller one may be zero in float32


@dataclass(frozen=True)
class SamplingParams:
    """Checked when made: raises RequestError naming the parameter and its range.

    temperature 0 is greedy; top_k 0 or -1, top_p 1 and min_p 0 keep every token; penalties as in the OpenAI API and,
    for repetition, in CTRL (arXiv:1909.05858); bias is added to the logits of these token ids.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    bias: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        top_k_fits = isinstance(self.top_k, int) and self.top_k >= -1
        seed_fits = isinstance(self.seed, int) and 0 <= self.seed < _SEED_LIMIT
        checks = [
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k, top_k_fits, "-1 or 0 for all tokens, or a positive number"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty, 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("seed", self.seed, seed_fits, "a number from 0 to 2^64 - 1"),
        ]
        for token, bias in self.bias.items():
            checks.append((f"the bias of token {token}", bias, -100 <= bias <= 100, "between -100 and 100"))
        for name, value, fits, wanted in checks:
            if not fits:  # NaN fits nowhere
                raise RequestError(f"{name} is {value}", f"It must be {wanted}.")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _LEAST_TEMPERATURE or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class SampledRow:
    """One row of logits to sample. `banned` are token ids that must not come now; `position` is the new token's."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    position: int
    banned: Sequence[int] = ()


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities, on the device: of each row's id (R,), and of its most likely ids (R, n)."""

    chosen: Buffer
    top_ids: Buffer
    top: Buffer


class Sampler:
    """Chooses between the greedy and the full graph, and fills the inputs of the latter."""

    def __init__(self, models: dict[str, Model], vocab_size: int) -> None:
        self._models = models
        self._vocab_size = vocab_size
        self._zeros: dict[tuple[int, str], Buffer] = {}

    def sample(self, logits: Buffer, rows: Sequence[SampledRow]) -> Buffer:
        """The next token of each row, (max_batch,) int32 on the device. logits: (R, V) with R >= len(rows)."""
        count = logits.shape[0]
        if all(row.params.is_greedy and not row.params.has_penalties and not row.banned for row in rows) and not any(
            row.params.bias for row in rows
        ):
            return self._models[f"sample_greedy_r{count}"](logits)[0]
        params = [row.params for row in rows] + [SamplingParams(temperature=0)] * (count - len(rows))

        def column(dtype: type, values: list[float]) -> np.ndarray:
            return np.array(values, dtype)

        inputs = [
            self._bias(rows, count),
            self._counts([row.prompt for row in rows], rows, count),
            self._counts([row.output for row in rows], rows, count),
            column(np.float32, [0.0 if p.is_greedy else p.temperature for p in params]),
            column(np.int32, [min(max(p.top_k, 0), self._vocab_size) for p in params]),
            column(np.float32, [p.top_p for p in params]),
            column(np.float32, [p.min_p for p in params]),
            column(np.float32, [p.repetition_penalty for p in params]),
            column(np.float32, [p.frequency_penalty for p in params]),
            column(np.float32, [p.presence_penalty for p in params]),
            np.array([[p.seed & 0xFFFFFFFF, p.seed >> 32] for p in params], np.uint32),
            np.array([row.position for row in rows] + [0] * (count - len(rows)), np.int32),
        ]
        return self._models[f"sample_full_r{count}"](logits, *inputs)[0]

    def logprobs(self, logits: Buffer, ids: Buffer) -> Logprobs:
        """How likely the model holds ids, before any setting of a request, and what it holds likeliest, best first.

        logits: (R, V); ids: (max_batch,) as `sample` gives them, of which the first R count
        """
        return Logprobs(*self._models[f"sample_logprobs_r{logits.shape[0]}"](logits, ids))

    def _bias(self, rows: Sequence[SampledRow], count: int) -> np.ndarray | Buffer:
        if not any(row.params.bias or row.banned for row in rows):
            return self._zero(count, "float32")
        bias = np.zeros((count, self._vocab_size), np.float32)
        for i, row in enumerate(rows):
            for token, value in row.params.bias.items():
                bias[i, token] = value
            bias[i, list(row.banned)] = -np.inf
        return bias

    def _counts(self, tokens: list[Sequence[int]], rows: Sequence[SampledRow], count: int) -> np.ndarray | Buffer:
        if not any(row.params.has_penalties for row in rows):
            return self._zero(count, "int32")
        counts = np.zeros((count, self._vocab_size), np.int32)
        for i, row in enumerate(rows):
            if row.params.has_penalties:
                counts[i] = np.bincount(np.asarray(tokens[i], np.int64), minlength=self._vocab_size)
        return counts

    def _zero(self, count: int, dtype: str) -> Buffer:
        """Zeros (count, V) that all calls share, made once."""
        if (count, dtype) not in self._zeros:
            shape = (count, self._vocab_size)
            self._zeros[count, dtype] = Buffer(xla.put_owned(shape, dtype), dtype, shape)
        return self._zeros[count, dtype]
