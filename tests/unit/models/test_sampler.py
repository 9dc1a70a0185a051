"""The samplers at their edges; tests/parity/test_sampler.py compares every draw with the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from max.compiler import Module, TensorType
from max.compiler.native import ISAS, library
from max.compiler.sampling import NUMBERS, SETTINGS, mask_words
from max.models import gpu_kernels, sampler
from max.models.sampler import add_samplers, sample_full, sample_greedy, threefry2x32, uniform

# Compiling takes longer than all draws, and optimizing most of that; what is computed is the same.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
greedy = quick_jit(sample_greedy)
GRAPHS = {"xla": quick_jit(sample_full), "triton": quick_jit(partial(sample_full, draw=gpu_kernels.draw))}
LIB = library()
VARIANTS = ["xla", "triton", *(isa for isa in ISAS if LIB is not None and LIB.supports(isa))]
variant = "xla"


@pytest.fixture(params=VARIANTS)
def _variant(request: pytest.FixtureRequest) -> Iterator[None]:
    """What draws does so in plain XLA, on the kernel for GPUs, interpreted, and on that of each instruction set."""
    global variant
    variant = request.param
    yield
    variant = "xla"
    if LIB is not None:
        LIB.select("")


draws = pytest.mark.usefixtures("_variant")


def draw(
    logits: np.ndarray, bias: np.ndarray | float = 0.0, seed: int = 5, *, banned: int | None = None, **settings: Any
) -> np.ndarray:
    """One token per row of (R, V) logits, row i at position i."""
    rows, columns = logits.shape
    mask = np.full((rows, mask_words(columns)), -1, np.int32)
    if banned is not None:
        mask.view(np.uint32)[:, banned // 32] ^= np.uint32(1 << banned % 32)
    history = np.zeros((1, columns), np.int32)
    biases = np.broadcast_to(np.float32(bias), history.shape).copy()
    defaults = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0} | settings
    floats = np.tile(np.array([defaults.get(name, 0.0) for name in SETTINGS], np.float32), (rows, 1))
    numbers = np.tile(np.array([settings.get("top_k", 0), 0, seed, 9, 0], np.int32), (rows, 1))
    numbers[:, NUMBERS.index("position")] = np.arange(rows)
    if np.all(biases == 0):
        numbers[:, NUMBERS.index("adjusted")] = -1
    return draw_with(logits, mask, history, biases, floats, numbers)


def draw_with(
    logits: np.ndarray, mask: np.ndarray, history: np.ndarray, biases: np.ndarray, *settings: np.ndarray
) -> np.ndarray:
    if variant == "triton" and len(logits) > 500:
        pytest.skip("the interpreter takes milliseconds a row, and tests/parity compares every draw")
    if variant in GRAPHS:  # few rows are filled up, so that each width is compiled once
        more = max(8 - len(logits), 0)
        filled = [np.pad(each, ((0, more), (0, 0)), mode="edge") for each in (logits, mask, *settings)]
        return np.asarray(GRAPHS[variant](*filled[:2], history, biases, *filled[2:]))[: len(logits)]
    assert LIB is not None
    LIB.select(variant)
    return LIB.sample(logits, mask, history, biases, *settings)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("key", "counter", "wanted"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_known_answers(key, counter, wanted):
    """Random123 1.14, tests/kat_vectors, threefry2x32 with 20 rounds."""
    words = [jnp.full(2, word, jnp.uint32) for word in (*key, *counter)]
    first, second = quick_jit(threefry2x32)(*words)
    assert (first.tolist(), second.tolist()) == ([wanted[0]] * 2, [wanted[1]] * 2)


def test_uniform_numbers_are_in_range_and_flat():
    seeds = np.tile(np.array([[1, 2]], np.uint32), (20_000, 1))
    numbers = np.asarray(quick_jit(uniform)(jnp.asarray(seeds), jnp.arange(20_000, dtype=jnp.int32)))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 100, "chi-square with 49 degrees of freedom is below 100 but once in 3e4"


@draws
@pytest.mark.quick(width=[300])
@pytest.mark.parametrize("width", [1, 100, 128, 300])
def test_greedy_is_argmax_for_any_width(width):
    logits = normal(width, 5, width)
    logits[1] = 3.0
    logits[2, width // 2 :] = 7.0
    logits[3] = -np.inf
    np.testing.assert_array_equal(greedy(logits), logits.argmax(axis=-1))
    np.testing.assert_array_equal(gpu_kernels.argmax(jnp.asarray(logits), 6), [*logits.argmax(axis=-1), 0])
    np.testing.assert_array_equal(draw(logits[:3], temperature=0.0), logits[:3].argmax(axis=-1))


@draws
@pytest.mark.quick(width=[300])
@pytest.mark.parametrize("width", [3, 300])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_without_a_finite_highest_value_give_no_token_and_spoil_no_other(width, value):
    logits = normal(width, 4, width)
    whole = draw(logits)
    logits[1] = value
    logits[2, width // 2] = value
    largest = np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))
    np.testing.assert_array_equal(greedy(logits), largest)
    np.testing.assert_array_equal(gpu_kernels.argmax(jnp.asarray(logits), 4), largest)
    np.testing.assert_array_equal(draw(logits, temperature=0.0), largest)
    for ids in (draw(logits), draw(logits, top_k=2, top_p=0.5, min_p=0.1)):
        assert ids[1] == -1
        assert (ids[2] == -1) == (value != -np.inf)
        assert ((ids[[0, 3]] >= 0) & (ids[[0, 3]] < width)).all()
    ids = draw(logits)
    assert (ids[0], ids[3]) == (whole[0], whole[3])


@draws
def test_a_nan_of_a_token_that_may_not_come_is_nobodys_business():
    logits = normal(4, 2, 300)
    whole = draw(logits)
    banned = next(token for token in range(300) if token not in whole)
    logits[:, banned] = np.nan
    np.testing.assert_array_equal(draw(logits), [-1, -1])
    for temperature in (0.0, 1.0):
        assert (draw(logits, banned=banned, temperature=temperature) >= 0).all()


@draws
@pytest.mark.parametrize("temperature", [1.2e-38, 1e-20, 1e-4])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = normal(1, 6, 300) * 30
    np.testing.assert_array_equal(draw(logits, temperature=temperature), logits.argmax(axis=-1))


@draws
def test_a_large_temperature_is_flat():
    ids = draw(np.tile(normal(2, 1, 60), (20_000, 1)), temperature=100.0)
    counts = np.bincount(ids, minlength=60)
    assert counts.min() > 240, "333 are expected of each"


@draws
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.99}, {"top_k": 290}, {"temperature": 0.0}, {"temperature": 50.0}])
def test_banned_tokens_never_come(settings):
    bias = np.zeros(300, np.float32)
    bias[np.random.default_rng(3).permutation(300)[:250]] = -np.inf
    logits = np.tile(normal(3, 1, 300), (3000, 1))
    logits[:, np.isinf(bias)] += 10
    ids = draw(logits, bias, **settings)
    assert (bias[ids] == 0).all()
    assert len(set(ids.tolist())) > 20 or settings == {"temperature": 0.0}


@draws
def test_shares_are_those_of_the_softmax():
    logits = normal(4, 1, 60) * 1.5
    chances = np.exp(logits[0].astype(np.float64))
    chances /= chances.sum()
    counts = np.bincount(draw(np.tile(logits, (20_000, 1))), minlength=60)
    expected = 20_000 * chances
    assert ((counts - expected) ** 2 / expected).sum() < 115, "59 degrees of freedom: above once in 5e5"


@draws
def test_a_draw_depends_on_seed_and_position_alone():
    logits = normal(5, 1, 300)
    many = draw(np.tile(logits, (64, 1)))
    few = draw(np.tile(logits, (7, 1)))
    np.testing.assert_array_equal(many[:7], few)
    other = np.tile(normal(6, 1, 300), (64, 1))
    other[20] = logits
    assert draw(other)[20] == many[20], "whatever the other rows hold"
    assert (draw(np.tile(logits, (64, 1)), seed=6) != many).sum() > 50


@draws
def test_zeros_of_both_signs_tie():
    logits = np.full((64, 300), -5.0, np.float32)
    logits[:, 2], logits[:, 5] = 0.0, -0.0
    assert set(draw(logits, top_k=1).tolist()) == {2, 5}


def test_rounding_never_leads_to_a_token_without_weight():
    """The sums of a parallel scan may grow over groups of zeros: u is put just there, and at both ends."""
    rng = np.random.default_rng(7)
    weights = rng.random((100, 384, 128), np.float32) * (rng.random((100, 384, 1)) < 0.3)
    weights[:, 0] = 0
    sums = np.asarray(jax.jit(lambda x: jnp.sum(x, axis=-1))(weights))
    running = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(sums))
    gap = (np.diff(running, axis=1) > 0) & (sums[:, 1:] == 0)
    assert gap.any(axis=1).sum() > 10, "otherwise this tests nothing"
    at_gap = running[np.arange(100), gap.argmax(axis=1)] / running[:, -1]
    inverse = jax.jit(sampler._inverse_cdf)
    for u in (at_gap, np.zeros(100, np.float32), np.full(100, 1 - 2**-24, np.float32)):
        for nudged in (u, np.nextafter(u, np.float32(0)), np.nextafter(u, np.float32(1))):
            index = np.asarray(inverse(weights, np.minimum(nudged, np.float32(1 - 2**-24))))
            assert (weights.reshape(100, -1)[np.arange(100), index] > 0).all()


@pytest.mark.parametrize("by", ["xla", "gpu"])
def test_graphs_take_rows_and_fill_the_batch(by):
    module = Module("samplers")
    add_samplers(module, rows=2, vocab_size=10, max_batch=5, by=by)
    assert list(module.graphs) == ["sample_greedy_r2", "sample_full_r2", "sample_logprobs_r2"]
    logits = normal(8, 2, 10)
    graph = module.graphs["sample_greedy_r2"]
    assert graph.inputs == {"logits": TensorType("float32", (2, 10))}
    (ids,) = quick_jit(graph.call_flat)(jnp.asarray(logits))
    assert (ids.dtype, ids.tolist()) == (jnp.int32, [*logits.argmax(axis=-1), 0, 0, 0])
    inputs = module.graphs["sample_full_r2"].inputs
    zeros = [jnp.zeros(type.shape, type.dtype) for type in inputs.values()]
    assert [zero.shape for zero in zeros] == [(2, 10), (2, 1), (5, 10), (5, 10), (2, 6), (2, 5)]
    (ids,) = quick_jit(module.graphs["sample_full_r2"].call_flat)(jnp.asarray(logits), *zeros[1:])
    assert ids.shape == (5,) and not ids[2:].any()
