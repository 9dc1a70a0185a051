"""The sampling graph draws what the float64 reference allows, each token at the reference's share of the unit interval.

The draw inverts the cumulative distribution at one number per row. That number is known, so that every single draw can
be checked, with room only for float32 at the borders between tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from sampling_reference import probabilities
from seeded import seeded_tensor, seeded_tokens

from max.compiler.native import ISAS, library
from max.compiler.sampling import NUMBERS, SETTINGS, mask_words
from max.models import gpu_kernels
from max.models.sampler import sample_full, sample_greedy, threefry2x32, uniform

ROWS, VOCAB = 256, 300
PROMPT = seeded_tokens("sampler prompt", 20, VOCAB).tolist()
OUTPUT = seeded_tokens("sampler output", 30, 40).tolist()
BORDER = 2e-5
LIB = library()
VARIANTS = ["xla", "triton", *(isa for isa in ISAS if LIB is not None and LIB.supports(isa))]
GRAPHS = {"xla": jax.jit(sample_full), "triton": jax.jit(partial(sample_full, draw=gpu_kernels.draw))}
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
REQUESTS = [
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


def draw(variant: str, logits: np.ndarray, bias: np.ndarray, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and uniform numbers, (R,), of one row of logits at some positions; what bias bans, the mask does."""
    rows = ROWS if variant != "triton" else 64  # the interpreter takes milliseconds for each
    seed, positions = (7, 11), np.arange(rows, dtype=np.int32)
    mask = np.packbits(np.resize(np.isfinite(bias), 32 * mask_words(VOCAB)), bitorder="little").view(np.int32)
    history = 2 * counts(OUTPUT) + (counts(PROMPT) > 0)
    numbers = np.tile(np.array([settings.get("top_k", 0), 0, *seed, 1], np.int32), (rows, 1))
    numbers[:, NUMBERS.index("position")] = positions
    inputs = (
        np.tile(logits, (rows, 1)),
        np.tile(mask, (rows, 1)),
        np.stack([99 + history, history]).astype(np.int32),
        np.stack([99 + bias, np.where(np.isfinite(bias), bias, 0)]),
        np.tile(np.array([(DEFAULTS | settings)[name] for name in SETTINGS], np.float32), (rows, 1)),
        numbers,
    )
    uniforms = uniform(jnp.tile(jnp.array([seed], jnp.uint32), (rows, 1)), jnp.asarray(positions))
    return run(variant, *inputs), np.asarray(uniforms, np.float64)


def run(variant: str, *inputs: np.ndarray) -> np.ndarray:
    if variant in GRAPHS:
        return np.asarray(GRAPHS[variant](*inputs))
    assert LIB is not None
    LIB.select(variant)
    try:
        return LIB.sample(*inputs)
    finally:
        LIB.select("")


def counts(tokens: list[int]) -> np.ndarray:
    return np.bincount(tokens, minlength=VOCAB).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("settings", REQUESTS, ids=str)
def test_every_draw_inverts_the_reference(settings, spread, variant):
    logits = seeded_tensor(f"sampler logits {spread}", (VOCAB,), spread)
    bias = np.zeros(VOCAB, np.float32)
    bias[[3, 50, int(logits.argmax())]] = [4.0, -np.inf, -2.0]
    ids, uniforms = draw(variant, logits, bias, settings)
    chances = probabilities(logits, PROMPT, OUTPUT, bias=bias, **settings)
    upper = np.cumsum(chances)
    assert (chances[ids] > 0).all()
    assert (uniforms <= upper[ids] + BORDER).all()
    assert (uniforms >= upper[ids] - chances[ids] - BORDER).all()


WIDE = 40_000
SHAPES = {
    "spread": lambda rng: rng.normal(scale=3, size=WIDE),
    "flat": lambda rng: np.zeros(WIDE),
    "nearly flat": lambda rng: rng.normal(scale=1e-3, size=WIDE),
    "levels": lambda rng: rng.integers(-20, 20, WIDE) / 4,
    "one above": lambda rng: np.where(np.arange(WIDE) == 31_234, 60, rng.normal(size=WIDE)),
    "falling": lambda rng: -np.arange(WIDE) / 100,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 255}, {"top_p": 0.9}, {"top_k": 9000, "top_p": 0.99, "min_p": 1e-4}]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_from_a_large_vocabulary(shape, settings, variant):
    """The longer way of the kernel: stripes, chunks of sums, and rounds of thresholds."""
    rows = 12
    logits = SHAPES[shape](np.random.default_rng(3)).astype(np.float32)
    numbers = np.tile(np.array([settings.get("top_k", 0), 0, 7, 11, -1], np.int32), (rows, 1))
    numbers[:, NUMBERS.index("position")] = np.arange(rows)
    floats = np.tile(np.array([(DEFAULTS | settings)[name] for name in SETTINGS], np.float32), (rows, 1))
    nothing = np.zeros((1, WIDE), np.int32), np.zeros((1, WIDE), np.float32)
    mask = np.full((rows, mask_words(WIDE)), -1, np.int32)
    ids = run(variant, np.tile(logits, (rows, 1)), mask, *nothing, floats, numbers)
    uniforms = uniform(jnp.tile(jnp.array([[7, 11]], jnp.uint32), (rows, 1)), jnp.arange(rows, dtype=jnp.int32))
    chances = probabilities(logits, **settings)
    upper = np.cumsum(chances)
    # A float32 sum of 40,000 weights may take in or leave out some tokens at the edge of top-p.
    border = 4e-4 if "top_p" in settings else 4e-5
    assert (np.abs(np.asarray(uniforms, np.float64) - upper[ids] + chances[ids] / 2) <= chances[ids] / 2 + border).all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0.0}], ids=str)
def test_the_gpu_kernel_draws_what_plain_xla_draws_from_the_largest_vocabularies(settings: dict[str, Any]) -> None:
    rows, width = 4, 256_000
    logits = np.random.default_rng(9).normal(scale=3, size=(rows, width)).astype(np.float32)
    numbers = np.array([[settings.get("top_k", 0), row, 7, 11, -1] for row in range(rows)], np.int32)
    floats = np.tile(np.array([(DEFAULTS | settings)[name] for name in SETTINGS], np.float32), (rows, 1))
    nothing = np.zeros((1, width), np.int32), np.zeros((1, width), np.float32)
    inputs = (logits, np.full((rows, mask_words(width)), -1, np.int32), *nothing, floats, numbers)
    np.testing.assert_array_equal(run("triton", *inputs), run("xla", *inputs))


@pytest.mark.skipif(LIB is None, reason="the package was installed without a C++ compiler")
def test_the_kernel_draws_the_same_whatever_the_batch_and_the_threads():
    assert LIB is not None
    rng = np.random.default_rng(5)
    logits = rng.normal(scale=2, size=(9, WIDE)).astype(np.float32)
    mask = rng.integers(-(2**31), 2**31, (9, mask_words(WIDE))).astype(np.int32)
    history, bias = rng.integers(0, 5, (3, WIDE)).astype(np.int32), rng.normal(size=(3, WIDE)).astype(np.float32)
    floats = np.array([[0.8, 0.95, 0.001, 1.1, 0.2, 0.1]] * 9, np.float32)
    numbers = np.array([[row * 30, row, 3, 4, row % 4 - 1] for row in range(9)], np.int32)
    try:
        LIB.set_num_threads(1)
        alone = [
            LIB.sample(logits[i : i + 1], mask[i : i + 1], history, bias, floats[i : i + 1], numbers[i : i + 1])[0]
            for i in range(9)
        ]
        for threads in (1, 2, 4):
            LIB.set_num_threads(threads)
            assert LIB.sample(logits, mask, history, bias, floats, numbers).tolist() == alone
    finally:
        LIB.set_num_threads(0)
    numbers[8, NUMBERS.index("adjusted")] = 3
    with pytest.raises(ValueError, match="adjusted row of row 8"):
        LIB.sample(logits, mask, history, bias, floats, numbers)


@pytest.mark.parametrize("variant", VARIANTS)
def test_temperature_zero_is_greedy_after_penalties(variant):
    logits = seeded_tensor("sampler greedy", (VOCAB,), 2.0)
    bias = np.zeros(VOCAB, np.float32)
    bias[logits.argmax()] = -np.inf
    settings: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 2.0}
    wanted = probabilities(logits, PROMPT, OUTPUT, bias=bias, **settings).argmax()
    assert wanted != logits.argmax()
    ids, _ = draw(variant, logits, bias, settings)
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
