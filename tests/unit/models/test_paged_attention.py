"""Ragged paged attention against dense attention in float64, over random mixes of prefill, decode and chunks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from max.models.paged_attention import make_tiles, paged_attention, tile_tokens, write_pages

ROWS, PAGE, MAX_PAGES, HEADS, KV_HEADS, DIM = 4, 4, 12, 6, 2, 8
NUM_PAGES = 1 + ROWS * MAX_PAGES


@dataclass
class Step:
    """One ragged step: per row the tokens before it and in it, and everything that the graph is given."""

    past: list[int]
    new: list[int]
    rows: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    page_table: np.ndarray


def make_step(tokens: int, counts: list[tuple[int, int, int]], rng: np.random.Generator) -> Step:
    """counts: (row, past, new) in the order in which the rows lie in the step of `tokens` tokens."""
    table = rng.permutation(np.arange(1, NUM_PAGES)).astype(np.int32).reshape(ROWS, MAX_PAGES)
    rows, positions, slots = np.full(tokens, -1, np.int32), np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    past, new, at = [0] * ROWS, [0] * ROWS, 0
    for row, before, count in counts:
        place = np.arange(before, before + count)
        rows[at : at + count], positions[at : at + count] = row, place
        slots[at : at + count] = table[row, place // PAGE] * PAGE + place % PAGE
        past[row], new[row], at = before, count, at + count
    held = [-(-(before + count) // PAGE) for before, count in zip(past, new, strict=True)]
    for row, pages in enumerate(held):
        table[row, pages:] = 0
    return Step(past, new, rows, positions, slots, table)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


SINKS = np.random.default_rng(0).normal(size=HEADS).astype(np.float32)


# Compiling takes most of the time here, and optimizing most of that; what is computed is the same.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
tiles_of = quick_jit(make_tiles, static_argnums=1)


@partial(quick_jit, donate_argnums=0, static_argnames=("window", "softcap", "scale", "has_sinks"))
def attend(pages, q, k, v, slots, page_table, rows, positions, window=0, softcap=0.0, scale=None, has_sinks=False):
    written = write_pages(pages, k, v, slots)
    more = {"window": window, "softcap": softcap, "scale": scale, "sinks": SINKS if has_sinks else None}
    return paged_attention(q, written, page_table, rows, positions, make_tiles(rows, ROWS), **more), written


def check(step: Step, rng: np.random.Generator, scale: float = 1.0, **variant: Any) -> None:
    """Runs a step over pages that are NaN wherever a row does not own them, and compares each real token."""
    tokens = len(step.rows)
    q = normal(rng, tokens, HEADS, DIM) * scale
    k, v = normal(rng, tokens, KV_HEADS, DIM), normal(rng, tokens, KV_HEADS, DIM)
    pages = np.full((NUM_PAGES, 2, KV_HEADS, PAGE, DIM), np.nan, np.float32)
    keys, values = {}, {}
    for row in range(ROWS):
        count = step.past[row] + step.new[row]
        # What an earlier owner left in the rest of the last page is finite, and must not be seen.
        pages[step.page_table[row, : -(-count // PAGE)]] = 1e4
        keys[row], values[row] = normal(rng, count, KV_HEADS, DIM), normal(rng, count, KV_HEADS, DIM)
        for place in range(step.past[row]):
            page = step.page_table[row, place // PAGE]
            pages[page, 0, :, place % PAGE], pages[page, 1, :, place % PAGE] = keys[row][place], values[row][place]
    for token in range(tokens):
        if step.rows[token] >= 0:
            keys[step.rows[token]][step.positions[token]] = k[token]
            values[step.rows[token]][step.positions[token]] = v[token]
    out, written = attend(pages, q, k, v, step.slots, step.page_table, step.rows, step.positions, **variant)
    out = np.asarray(out).reshape(tokens, HEADS, DIM)
    for token in np.flatnonzero(step.rows >= 0):
        row, count = step.rows[token], step.positions[token] + 1
        wanted = dense(q[token], keys[row][:count], values[row][:count], **variant)
        np.testing.assert_allclose(out[token], wanted, rtol=2e-5, atol=2e-5)
    check_written(step, pages, np.asarray(written), k, v)


def dense(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int = 0, softcap: float = 0.0,
    scale: float = DIM**-0.5, has_sinks: bool = False,
) -> np.ndarray:  # fmt: skip
    """Softmax attention of one token, (N, H), in float64; query head n looks at key head n // group."""
    keys, values = keys[-window:], values[-window:]
    keys, values = (np.repeat(x.astype(np.float64), HEADS // KV_HEADS, axis=1) for x in (keys, values))
    scores = np.einsum("nh,snh->ns", q.astype(np.float64), keys) * scale
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    if has_sinks:
        scores = np.concatenate([scores, SINKS[:, None]], axis=1)
        values = np.concatenate([values, np.zeros_like(values[:1])])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("ns,snh->nh", weights / weights.sum(axis=1, keepdims=True), values)


def check_written(step: Step, before: np.ndarray, after: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """The step's own slots hold its keys and values, page 0 took the padding, and nothing else has changed."""
    expected = before.copy()
    for token in np.flatnonzero(step.rows >= 0):
        page, offset = divmod(int(step.slots[token]), PAGE)
        expected[page, 0, :, offset], expected[page, 1, :, offset] = k[token], v[token]
    np.testing.assert_array_equal(after[1:], expected[1:])


def random_counts(tokens: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Rows in random order with random histories; one to all of the tokens are used."""
    rows = rng.permutation(ROWS)[: rng.integers(1, min(ROWS, tokens) + 1)]
    left = int(rng.integers(len(rows), tokens + 1))
    counts = []
    for i, row in enumerate(rows):
        most = min(left - (len(rows) - 1 - i), MAX_PAGES * PAGE)
        count = 1 if rng.random() < 0.3 else int(rng.integers(1, most + 1))
        past = 0 if rng.random() < 0.3 else int(rng.integers(0, MAX_PAGES * PAGE - count + 1))
        counts.append((int(row), past, count))
        left -= count
    return counts


@pytest.mark.quick(tokens=[1, 17])
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 16, 17, 32, 64])
def test_random_mixes(tokens):
    rng = np.random.default_rng(tokens)
    for _ in range(25):
        check(make_step(tokens, random_counts(tokens, rng), rng), rng)


ALL_AT_ONCE = {"window": 20, "softcap": 3.0, "scale": 0.2, "has_sinks": True}


@pytest.mark.quick(tokens=[16], variant=[{"window": 9}, ALL_AT_ONCE])
@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize(
    "variant",
    [{"window": 1}, {"window": 9}, {"softcap": 1.5}, {"scale": 0.7}, {"has_sinks": True}, ALL_AT_ONCE],
    ids=str,
)
def test_window_softcap_scale_and_sinks(tokens, variant):
    rng = np.random.default_rng(tokens)
    for _ in range(8):
        check(make_step(tokens, random_counts(tokens, rng), rng), rng, **variant)


@pytest.mark.parametrize("past", [0, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 1, MAX_PAGES * PAGE - 16])
def test_chunks_around_page_boundaries(past):
    rng = np.random.default_rng(past)
    for new in (1, PAGE - 1, PAGE, PAGE + 1, 16):
        check(make_step(16, [(2, past, new)], rng), rng)


def test_a_full_decode_batch_and_a_full_prompt():
    rng = np.random.default_rng(0)
    check(make_step(4, [(row, 10 * row, 1) for row in range(ROWS)], rng), rng)
    check(make_step(17, [(1, 0, 17)], rng), rng)


def test_large_scores_neither_overflow_nor_lose_the_sum():
    rng = np.random.default_rng(1)
    check(make_step(16, [(0, 20, 5), (3, 0, 9)], rng), rng, scale=60.0)


def test_a_step_of_padding_alone_is_finite():
    rng = np.random.default_rng(2)
    step = make_step(8, [], rng)
    pages = np.full((NUM_PAGES, 2, KV_HEADS, PAGE, DIM), np.nan, np.float32)
    kv = normal(rng, 8, KV_HEADS, DIM)
    out, _ = attend(pages, normal(rng, 8, HEADS, DIM), kv, kv, step.slots, step.page_table, step.rows, step.positions)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("tokens", [4, 17])
def test_what_is_written_is_finite(tokens):
    """The next owner of a page multiplies what it finds there by zero."""
    pages = jnp.zeros((NUM_PAGES, 2, KV_HEADS, PAGE, DIM))
    bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0] * (DIM // 4))
    kv = jnp.broadcast_to(bad, (tokens, KV_HEADS, DIM))
    written = quick_jit(write_pages)(pages, kv, kv, jnp.arange(tokens, dtype=jnp.int32))
    assert jnp.isfinite(written).all()
    assert (written[..., 3].sum(), written[..., 0].sum()) == (tokens * KV_HEADS * 2, 0)


def test_two_rows_cannot_see_each_other():
    """The same row alone, and beside another, gives the same bits."""
    rng = np.random.default_rng(3)
    q, k, v = normal(rng, 8, HEADS, DIM), normal(rng, 8, KV_HEADS, DIM), normal(rng, 8, KV_HEADS, DIM)
    alone, both = make_step(8, [(0, 0, 5)], rng), make_step(8, [(0, 0, 5), (1, 0, 3)], rng)
    pages = np.zeros((NUM_PAGES, 2, KV_HEADS, PAGE, DIM), np.float32)
    first, _ = attend(pages, q, k, v, alone.slots, alone.page_table, alone.rows, alone.positions)
    second, _ = attend(pages, q, k, v, both.slots, both.page_table, both.rows, both.positions)
    np.testing.assert_array_equal(first[:5], second[:5])


@pytest.mark.parametrize("tokens", [1, 3, 16, 17])
def test_tiles_cover_every_token_of_one_row_each(tokens):
    rng = np.random.default_rng(tokens)
    size = tile_tokens(tokens)
    for _ in range(20):
        rows = make_step(tokens, random_counts(tokens, rng), rng).rows
        tiles = tiles_of(jnp.asarray(rows), ROWS)
        starts = np.asarray(tiles.starts)[: int(tiles.num_tiles)]
        assert (np.diff(starts) > 0).all()
        covered = [
            token for start in starts for token in range(start, min(start + size, tokens)) if rows[token] == rows[start]
        ]
        assert covered == np.flatnonzero(rows >= 0).tolist()
