"""The sampling graph draws what the float64 reference allows, each token at the reference's share of the unit interval.

The draw inverts the cumulative distribution at one number per row. That number is known, so that every single draw can
be checked, with room only for float32 at the borders between tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from sampling_reference import probabilities
from seeded import seeded_tensor, seeded_tokens

from max.models.sampler import sample_full, sample_greedy, threefry2x32, uniform

ROWS, VOCAB = 256, 300
PROMPT = seeded_tokens("sampler prompt", 20, VOCAB).tolist()
OUTPUT = seeded_tokens("sampler output", 30, 40).tolist()
BORDER = 2e-5
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 3.0, "top_k": 7},
    {"top_k": 1},
    {"top_k": VOCAB + 5},
    {"top_p": 0.4},
    {"top_p": 0.97},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "temperature": 0.8},
    {"frequency_penalty": 0.6, "presence_penalty": -0.5},
    {"repetition_penalty": 1.2, "frequency_penalty": -0.3, "presence_penalty": 0.9, "top_p": 0.9},
]


def draw(logits: np.ndarray, bias: np.ndarray, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and uniform numbers, (R,), of one row of logits at `ROWS` positions."""
    column = {key: jnp.full(ROWS, settings.get(key, value), type_of(value)) for key, value in DEFAULTS.items()}
    seeds = jnp.tile(jnp.array([[7, 11]], jnp.uint32), (ROWS, 1))
    positions = jnp.arange(ROWS, dtype=jnp.int32)
    wide = [jnp.asarray(np.tile(row, (ROWS, 1))) for row in (logits, bias, counts(PROMPT), counts(OUTPUT))]
    ids = jax.jit(sample_full)(*wide, **column, seeds=seeds, positions=positions)
    return np.asarray(ids), np.asarray(uniform(seeds, positions), np.float64)


def type_of(value: float) -> jnp.dtype:
    return jnp.dtype(jnp.int32 if isinstance(value, int) else jnp.float32)


def counts(tokens: list[int]) -> np.ndarray:
    return np.bincount(tokens, minlength=VOCAB).astype(np.int32)


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_draw_inverts_the_reference(settings, spread):
    logits = seeded_tensor(f"sampler logits {spread}", (VOCAB,), spread)
    bias = np.zeros(VOCAB, np.float32)
    bias[[3, 50, int(logits.argmax())]] = [4.0, -np.inf, -2.0]
    ids, uniforms = draw(logits, bias, settings)
    chances = probabilities(logits, PROMPT, OUTPUT, bias=bias, **settings)
    upper = np.cumsum(chances)
    assert (chances[ids] > 0).all()
    assert (uniforms <= upper[ids] + BORDER).all()
    assert (uniforms >= upper[ids] - chances[ids] - BORDER).all()


def test_temperature_zero_is_greedy_after_penalties():
    logits = seeded_tensor("sampler greedy", (VOCAB,), 2.0)
    bias = np.zeros(VOCAB, np.float32)
    bias[logits.argmax()] = -np.inf
    settings: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 2.0}
    wanted = probabilities(logits, PROMPT, OUTPUT, bias=bias, **settings).argmax()
    assert wanted != logits.argmax()
    ids, _ = draw(logits, bias, settings)
    assert (ids == wanted).all()


def test_greedy_takes_the_first_of_the_largest():
    logits = np.stack([seeded_tensor(f"greedy {row}", (VOCAB,), 1.0) for row in range(4)])
    logits[1, [270, 9, 141]] = 50.0
    np.testing.assert_array_equal(sample_greedy(jnp.asarray(logits)), logits.argmax(axis=-1))


def test_threefry_is_that_of_jax():
    words = jnp.asarray(np.array([[0, 0], [1, 2], [0xFFFFFFFF, 0xFFFFFFFF], [0x13198A2E, 0x03707344]], np.uint32))
    for key0, key1 in words:
        first, second = threefry2x32(jnp.full(4, key0), jnp.full(4, key1), words[:, 0], words[:, 1])
        # jax takes the first words of all counters, then the second ones.
        wanted = threefry_2x32(jnp.stack([key0, key1]), words.T.ravel())
        np.testing.assert_array_equal(jnp.concatenate([first, second]), wanted)
