"""How a request's tokens are chosen: the parameters, and their rows in the sampler graphs' inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .. import RequestError
from ..compiler import xla
from ..compiler.sampling import NUMBERS, SETTINGS, mask_words
from .adjustments import Adjustments
from .model import Buffer, Model, share

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
    """One row of logits to sample, at the new token's `position` in the row.

    banned:  token ids that must not come now
    allowed: (mask_words,) int32, a bit for each token that may come; None for all
    """

    request: str
    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    position: int
    banned: Sequence[int] = ()
    allowed: np.ndarray | None = None

    @property
    def bias(self) -> dict[int, float]:
        return self.params.bias

    @property
    def has_penalties(self) -> bool:
        return self.params.has_penalties

    @property
    def takes_the_largest(self) -> bool:
        """Whether the token is the largest of the logits as they are."""
        changed = self.has_penalties or self.bias or self.banned or self.allowed is not None
        return self.params.is_greedy and not changed


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities: of a token, and of the likeliest ones in its place, best first."""

    token: float
    top_ids: list[int]
    top: list[float]


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities, on the device: of each row's id (R,), and of its most likely ids (R, n)."""

    chosen: Buffer
    top_ids: Buffer
    top: Buffer


class Sampler:
    """Chooses between the greedy and the full graph, and fills the inputs of the latter."""

    def __init__(self, models: dict[str, Model], vocab_size: int, max_batch: int) -> None:
        self._models = models
        self._vocab_size = vocab_size
        self._adjustments = Adjustments(max_batch, vocab_size)
        self._all_allowed: dict[int, Buffer] = {}
        self._last: Buffer | None = None  # of the full graph

    def sample(self, logits: Buffer, rows: Sequence[SampledRow], likeliest: Buffer | None = None) -> Buffer:
        """The next token of each row, (max_batch,) int32 on the device; -1 where the logits are not finite numbers.

        logits:    (R, V) with R >= len(rows)
        likeliest: what the greedy graph would give, where the step has given it
        """
        count = logits.shape[0]
        if all(row.takes_the_largest for row in rows):
            return likeliest if likeliest is not None else self._models[f"sample_greedy_r{count}"](logits)[0]
        is_written = not self._adjustments.are_none or any(row.has_penalties or row.bias for row in rows)
        if self._last is not None and is_written:
            xla.wait([self._last.array])
        places = self._adjustments.places(rows)
        settings, numbers = np.zeros((count, len(SETTINGS)), np.float32), np.zeros((count, len(NUMBERS)), np.int32)
        settings[: len(rows)] = [self._settings(row.params) for row in rows]
        numbers[: len(rows)] = [self._numbers(row, place) for row, place in zip(rows, places, strict=True)]
        numbers[len(rows) :, -1] = -1
        history, bias = self._adjustments.history, self._adjustments.bias
        mask = self._mask(rows, count)
        self._last = self._models[f"sample_full_r{count}"](logits, mask, history, bias, settings, numbers)[0]
        return self._last

    def _settings(self, params: SamplingParams) -> tuple[float, ...]:
        """Columns SETTINGS."""
        p = params
        temperature = 0.0 if p.is_greedy else p.temperature
        return temperature, p.top_p, p.min_p, p.repetition_penalty, p.frequency_penalty, p.presence_penalty

    def _numbers(self, row: SampledRow, place: int) -> tuple[int, ...]:
        """Columns NUMBERS."""
        seed = np.array([row.params.seed & 0xFFFFFFFF, row.params.seed >> 32], np.uint32).view(np.int32)
        return min(max(row.params.top_k, 0), self._vocab_size), row.position, *seed.tolist(), place

    def _mask(self, rows: Sequence[SampledRow], count: int) -> np.ndarray | Buffer:
        words = mask_words(self._vocab_size)
        if not any(row.banned or row.allowed is not None for row in rows):
            if count not in self._all_allowed:
                self._all_allowed[count] = share(np.full((count, words), -1, np.int32))
            return self._all_allowed[count]
        mask = np.full((count, words), -1, np.int32)
        for i, row in enumerate(rows):
            if row.allowed is not None:
                mask[i] = row.allowed
            for token in row.banned:
                mask.view(np.uint32)[i, token // 32] &= np.uint32(0xFFFFFFFF ^ 1 << token % 32)
        return mask

    def logprobs(self, logits: Buffer, ids: Buffer) -> Logprobs:
        """How likely the model holds ids, before any setting of a request, and what it holds likeliest, best first.

        logits: (R, V); ids: (max_batch,) as `sample` gives them, of which the first R count
        """
        return Logprobs(*self._models[f"sample_logprobs_r{logits.shape[0]}"](logits, ids))
