"""What the sampler graphs take: as `models/` describes them, and as the runtime fills them. Imports no jax."""

from __future__ import annotations

SETTINGS: tuple[str, ...] = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
"""Columns of `settings`, float32; temperature 0 takes the most likely token, a top_p of 1 and a min_p of 0 keep all."""

NUMBERS: tuple[str, ...] = ("top_k", "position", "seed_low", "seed_high", "adjusted")
"""Columns of `numbers`, int32: top_k 0 keeps all; `adjusted` is the row's place in history and bias, or -1."""

TOP_LOGPROBS = 20
"""The most tokens whose probabilities are told beside the chosen one's, as in the OpenAI API."""


def mask_words(vocab_size: int) -> int:
    """Words of a row of `mask`: bit t % 32 of int32 t // 32 tells whether token t may come."""
    return -(-vocab_size // 32)
