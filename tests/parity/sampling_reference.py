"""What a sampler must draw from: penalties and filters written out in float64, one row at a time, to be read.

The order is that of `probabilities`: repetition, frequency and presence penalties, bias, temperature, top-k, top-p
within top-k, min-p. Filters keep ties: a token is dropped for being less likely than another, never for its id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def penalize(
    logits: np.ndarray,
    prompt: Sequence[int],
    output: Sequence[int],
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> np.ndarray:
    """Logits (V,) made smaller for tokens that occurred.

    repetition: shrinks positive and grows negative logits of tokens in prompt or output (CTRL, arXiv:1909.05858)
    frequency:  subtracted per occurrence in the output (OpenAI API reference, as in vLLM: the prompt does not count)
    presence:   subtracted once for each token that occurs in the output
    """
    seen = np.zeros(len(logits), bool)
    seen[[*prompt, *output]] = True
    counts = np.bincount(np.asarray(output, np.int64), minlength=len(logits))
    repeated = np.where(logits > 0, logits / repetition, logits * repetition)
    return np.where(seen, repeated, logits) - frequency * counts - presence * (counts > 0)


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """-inf for all that are less likely than the k-th; 0 keeps all."""
    if k <= 0 or k >= len(logits):
        return logits
    return np.where(logits >= np.sort(logits)[-k], logits, -np.inf)


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """-inf for tokens before which the more likely ones already make p together; keeps at least the most likely.

    Source: nucleus sampling, arXiv:1904.09751.
    """
    chances = softmax(logits)
    ranked = np.sort(chances)[::-1]
    mass_up_to = np.concatenate([[0.0], np.cumsum(ranked)])
    more_likely = np.searchsorted(-ranked, -chances, side="left")
    return np.where((mass_up_to[more_likely] < p) | (more_likely == 0), logits, -np.inf) if p < 1 else logits


def keep_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """-inf for tokens with less than p times the chance of the most likely one. Source: arXiv:2407.01082."""
    chances = softmax(logits)
    return np.where(chances >= p * chances.max(), logits, -np.inf)


def probabilities(
    logits: np.ndarray,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    *,
    bias: np.ndarray | float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> np.ndarray:
    """The chance of each token, (V,) float64; all of it on the first of the most likely where temperature is 0."""
    penalties = (repetition_penalty, frequency_penalty, presence_penalty)
    adjusted = penalize(np.asarray(logits, np.float64), prompt, output, *penalties) + bias
    if temperature == 0:
        return np.eye(len(adjusted))[adjusted.argmax()]
    kept = keep_top_k(adjusted / temperature, top_k)
    return softmax(keep_min_p(keep_top_p(kept, top_p), min_p))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
