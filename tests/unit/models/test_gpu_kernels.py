"""The GPU kernels, interpreted, against the plain formulation of the CPU side; padding, odd sizes and shared pools."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from max.compiler.graph import TensorType
from max.compiler.triton.interpreter import interpret
from max.compiler.triton.paged_attention import (
    Attention,
    combine_kernel,
    max_tiles,
    paged_attention_kernel,
    tokens_per_tile,
)
from max.models import paged_attention as cpu
from max.models.gpu_kernels import add_rms_norm, make_tiles, paged_attention, rms_norm, rope_kv_write
from max.models.rope import rotate

LAYERS, PAGES = 3, 7
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
write = quick_jit(rope_kv_write, static_argnames=("layer", "num_pages", "num_heads"))


def same_bits(actual: Any, expected: Any) -> None:
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(expected, np.float32))


# --- rope_kv_write -------------------------------------------------------------------------------------------------


@pytest.mark.quick(heads=[6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens", "tokens"), [(4, 2, 8, 4, 5), (6, 1, 32, 16, 9), (3, 3, 24, 2, 8)]
)
def test_rope_kv_write(dtype: str, heads: int, kv_heads: int, head_dim: int, page_tokens: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    width = heads + 2 * kv_heads
    qkv = jnp.asarray(rng.normal(size=(tokens, width * head_dim)), dtype)
    angles = rng.normal(size=(tokens, head_dim // 2)).astype(np.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    slots = rng.permutation(np.arange(page_tokens, PAGES * page_tokens))[:tokens].astype(np.int32)
    slots[-1] = 0  # padding
    pool = jnp.asarray(rng.normal(size=(LAYERS * PAGES, 2, kv_heads, page_tokens, head_dim)), dtype)

    q, written = write(qkv, cos, sin, jnp.asarray(slots), pool, layer=1, num_pages=PAGES, num_heads=heads)

    @quick_jit
    def expected(qkv: jax.Array, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = qkv.astype(jnp.float32).reshape(tokens, width, head_dim)
        rotated = rotate(each[:, : heads + kv_heads], cos, sin).astype(dtype)
        values = each[:, heads + kv_heads :].astype(dtype)
        own = cpu.write_pages(pool[PAGES : 2 * PAGES], rotated[:, heads:], values, jnp.asarray(slots))
        return rotated[:, :heads], pool.at[PAGES : 2 * PAGES].set(own)

    for actual, wanted in zip((q, written), expected(qkv, pool), strict=True):
        same_bits(actual, wanted)


def test_rope_kv_write_keeps_float32_queries_beside_bfloat16_pages() -> None:
    qkv = jnp.arange(32, dtype=jnp.float32).reshape(1, 32) / 7
    pool = jnp.zeros((2, 2, 1, 2, 8), jnp.bfloat16)
    one, none = jnp.ones((1, 4)), jnp.zeros((1, 4))
    q, written = rope_kv_write(qkv, one, none, jnp.array([3], jnp.int32), pool, layer=0, num_pages=2, num_heads=2)
    same_bits(q, qkv[:, :16].reshape(1, 2, 8))
    same_bits(written[1, :, 0, 1], qkv[0, 16:].reshape(2, 8).astype(jnp.bfloat16))
    assert jnp.count_nonzero(written) == 16


# --- tiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[], [(2, 30, 1)], [(0, 0, 9), (3, 5, 1), (1, 2, 3)], [(3, 0, 8), (1, 4, 8)]])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_every_token_is_in_one_tile_of_its_row(counts: list[tuple[int, int, int]], group: int) -> None:
    step = make_step(16, counts, 4, np.random.default_rng(0))
    tiles = np.asarray(tiles_of(jnp.asarray(step.rows), jnp.asarray(step.positions), max_rows=ROWS, group=group))
    used = [tile for tile in tiles.tolist() if tile[2]]
    assert [token for _, first, count, _ in used for token in range(first, first + count)] == list(range(16))
    for row, first, count, last in used:
        assert 0 < count <= tokens_per_tile(16, group)
        is_padding = step.rows[first] < 0
        assert set(step.rows[first : first + count]) == {-1 if is_padding else row}
        assert last == (-1 if is_padding else step.positions[first + count - 1])
    assert (tiles[len(used) :] == [0, 0, 0, -1]).all()


@pytest.mark.parametrize("tokens", [1, 8, 64, 65, 500])
@pytest.mark.parametrize("group", [1, 3, 8, 32])
def test_the_tiles_of_any_step_fit_their_table(tokens: int, group: int) -> None:
    """The worst cut: rows that each leave one token over."""
    size = tokens_per_tile(tokens, group)
    for rows in range(1, min(tokens, 20) + 1):
        lengths = [size + 1] * (rows - 1)
        if sum(lengths) < tokens:
            lengths.append(tokens - sum(lengths))
            assert sum(-(-length // size) for length in lengths) <= max_tiles(tokens, group, rows)


# --- paged_attention -----------------------------------------------------------------------------------------------

ROWS, MAX_LENGTH, LAYER = 4, 64, 1


@dataclass
class Step:
    """A ragged step: for each row (row, tokens before it, tokens in it), and what a graph is given of it."""

    counts: list[tuple[int, int, int]]
    rows: np.ndarray
    positions: np.ndarray
    page_table: np.ndarray


def make_step(tokens: int, counts: list[tuple[int, int, int]], page_tokens: int, rng: np.random.Generator) -> Step:
    max_pages = MAX_LENGTH // page_tokens
    table = rng.permutation(np.arange(1, 1 + ROWS * max_pages)).astype(np.int32).reshape(ROWS, max_pages)
    rows, positions, at = np.full(tokens, -1, np.int32), np.zeros(tokens, np.int32), 0
    held = [0] * ROWS
    for row, past, new in counts:
        rows[at : at + new], positions[at : at + new] = row, np.arange(past, past + new)
        held[row], at = -(-(past + new) // page_tokens), at + new
    for row, pages in enumerate(held):
        table[row, pages:] = 0
    return Step(counts, rows, positions, table)


def filled_pool(step: Step, layers: int, shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Values at the positions of rows in one layer; NaN in all other memory."""
    _, _, _, page_tokens, _ = shape
    pool = np.full((layers, *shape), np.nan, np.float32)
    for row, past, new in step.counts:
        for place in range(past + new):
            page = step.page_table[row, place // page_tokens]
            pool[LAYER, page, :, :, place % page_tokens] = rng.normal(size=(shape[1], shape[2], shape[4]))
    return np.asarray(jnp.asarray(pool.reshape(-1, *shape[1:]), dtype))


def dense_attention(step: Step, q: np.ndarray, pages: np.ndarray, scale: float, **variant: Any) -> np.ndarray:
    """(T, N, H) float64 by a softmax over all keys that a token sees; zeros for padding. pages: of the layer."""
    result = np.zeros(q.shape)
    softcap, window, sinks = (variant.get(name) for name in ("softcap", "window", "sinks"))
    for token in np.flatnonzero(step.rows >= 0):
        row, position = step.rows[token], step.positions[token]
        places = np.arange(max(position - window + 1, 0) if window else 0, position + 1)
        kv = pages[step.page_table[row, places // pages.shape[3]], :, :, places % pages.shape[3]]
        keys, values = (np.repeat(kv[:, i], q.shape[1] // kv.shape[2], axis=1) for i in range(2))
        scores = np.einsum("snh,nh->ns", keys, q[token]) * scale
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores)
        total = weights.sum(1) + (np.exp(np.asarray(sinks, np.float64)) if sinks is not None else 0)
        result[token] = np.einsum("ns,snh->nh", weights, values) / total[:, None]
    return result


tiles_of = quick_jit(make_tiles, static_argnames=("max_rows", "group"))


def check_attention(
    step: Step, heads: int, kv_heads: int, head_dim: int, page_tokens: int, dtype: str, **variant: Any
) -> None:
    """Runs a step and compares every token with dense attention in float64."""
    rng = np.random.default_rng(5)
    num_pages = 1 + ROWS * (MAX_LENGTH // page_tokens)
    pool = filled_pool(step, 2, (num_pages, 2, kv_heads, page_tokens, head_dim), dtype, rng)
    q = jnp.asarray(rng.normal(size=(len(step.rows), heads, head_dim)), dtype)
    pages = pool[LAYER * num_pages :].astype(np.float64)
    expected = dense_attention(step, np.asarray(q, np.float64), pages, **({"scale": head_dim**-0.5} | variant))
    if window := variant.get("window"):  # pages in front of it belong to no row any more
        for row, past, _ in step.counts:
            step.page_table[row, : max(past - window + 1, 0) // page_tokens] = 0
    positions = jnp.asarray(step.positions)
    tiles = tiles_of(jnp.asarray(step.rows), positions, max_rows=ROWS, group=heads // kv_heads)
    place = {"layer": LAYER, "num_pages": num_pages}
    table = jnp.asarray(step.page_table)
    result = paged_attention(q, jnp.asarray(pool), table, positions, tiles, **place, **variant)
    assert (result.dtype, result.shape) == (q.dtype, (len(step.rows), heads * head_dim))
    checked = step.rows >= (0 if "sinks" in variant else -1)
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    actual = np.asarray(result, np.float32).reshape(q.shape)
    np.testing.assert_allclose(actual[checked], expected[checked], rtol=tolerance, atol=tolerance)


MIXED = [(0, 0, 5), (2, 63, 1), (1, 17, 4)]
DECODE = [(3, 0, 1), (0, 15, 1), (1, 16, 1), (2, 62, 1)]
LONG = [(1, 0, 50), (0, 40, 1), (2, 3, 21)]
SINKS = jnp.asarray(np.random.default_rng(0).normal(size=4), jnp.float32)


@pytest.mark.quick(dtype=["bfloat16"], counts=[MIXED])
@pytest.mark.quick(dtype=["float32"], head_dim=[16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens"),
    [(2, 2, 32, 16), (4, 2, 16, 4), (8, 1, 64, 8), (6, 2, 24, 16), (2, 1, 32, 64)],
)
@pytest.mark.parametrize(("tokens", "counts"), [(13, MIXED), (8, DECODE), (75, LONG), (8, [(2, 0, 8)])])
def test_paged_attention(
    dtype: str, heads: int, kv_heads: int, head_dim: int, page_tokens: int, tokens: int, counts: list
) -> None:
    step = make_step(tokens, counts, page_tokens, np.random.default_rng(0))
    check_attention(step, heads, kv_heads, head_dim, page_tokens, dtype)


@pytest.mark.quick(counts=[MIXED])
@pytest.mark.parametrize(
    "variant",
    [
        {"window": 1},
        {"window": 7},
        {"window": 40},
        {"softcap": 0.7},
        {"scale": 2.5},
        {"sinks": SINKS},
        {"window": 9, "softcap": 3.0, "sinks": SINKS},
    ],
    ids=str,
)
@pytest.mark.parametrize(("tokens", "counts"), [(13, MIXED), (8, DECODE), (75, LONG)])
def test_variants_of_attention(variant: dict[str, Any], tokens: int, counts: list) -> None:
    step = make_step(tokens, counts, 4, np.random.default_rng(1))
    check_attention(step, 4, 2, 16, 4, "float32", **variant)


def test_keys_of_a_tile_are_shared_out_where_tiles_are_few() -> None:
    def about(tokens: int, kv_heads: int) -> Attention:
        q = TensorType("bfloat16", (tokens, 4 * kv_heads, 128))
        pool, table = TensorType("bfloat16", (64, 2, kv_heads, 16, 128)), TensorType("int32", (8, 8))
        return Attention(q, pool, table, max_tiles(tokens, 4, 8), 1.0)

    assert [about(tokens, 8).splits for tokens in (8, 16, 64, 512)] == [8, 4, 2, 1]
    assert about(8, 1).splits == 8, "no more than a combination can take"
    assert [kernel.grid for kernel in (paged_attention_kernel(about(8, 8)), combine_kernel(about(8, 8)))] == [
        (8, 8, 8), (8, 8, 1)
    ]  # fmt: skip


def test_attention_reads_pages_behind_two_to_the_31_elements() -> None:
    """What fits int32 must not be assumed of a pool; its memory is never touched but for two pages."""
    shape = (2**31 // (2 * 16 * 64) + 2, 2, 1, 16, 64)
    pool = np.zeros(shape, ml_dtypes.bfloat16)
    pool[-1] = 3
    types = [TensorType("bfloat16", (8, 1, 64)), TensorType("bfloat16", shape), TensorType("int32", (1, 1))]
    kernel = paged_attention_kernel(Attention(*types, num_tiles=512, scale=1.0))
    tiles = np.array([[0, 0, 1, 2]] + [[0, 0, 0, -1]] * 511, np.int32)
    last = np.array([[1]], np.int32)
    q, positions = np.ones((8, 1, 64), ml_dtypes.bfloat16), np.full(8, 2, np.int32)
    first_page = np.array([shape[0] - 2], np.int32)
    result = interpret(kernel, q, pool, last, positions, tiles, first_page)[0]
    assert (result[0] == 3).all()
    assert np.isnan(result[1:].astype(np.float32)).all(), "tokens of no tile"


# --- norms ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick(width=[1, 1000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 24, 512, 1000])
def test_norms(dtype: str, width: int) -> None:
    rng = np.random.default_rng(width)
    x, delta = (jnp.asarray(rng.normal(scale=3, size=(5, width)), dtype) for _ in range(2))
    weight = jnp.asarray(rng.normal(size=width), dtype)
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-5

    def check(found: jax.Array, total: jax.Array) -> None:
        exact = np.asarray(total, np.float64)
        scale = 1 / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5)
        assert found.dtype == x.dtype
        expected = exact * scale * np.asarray(weight, np.float64)
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)

    check(rms_norm(x, weight, 1e-5), x)
    total, normed = add_rms_norm(x, delta, weight, 1e-5)
    same_bits(total, x + delta)
    check(normed, total)
