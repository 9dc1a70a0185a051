"""Ragged paged attention in plain XLA: one formulation for prefill, chunked prefill, decode and mixed batches.

The tokens of a step lie row after row. They are cut into tiles of one row each; every tile visits only the pages that
it can see, with an online softmax, so that the work follows the real lengths and nothing of the size of the context
is ever gathered. Sources: PagedAttention, arXiv:2309.06180; online softmax, arXiv:1805.02867.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_TILES_PER_STEP = 8  # a long prompt makes this many tiles: few enough to be efficient, small enough for lone decodes
_MAX_UPDATES = 16


class Tiles(NamedTuple):
    """The tiles of a step: first tokens (W,) int32 in ascending order, and how many there are, () int32."""

    starts: jax.Array
    num_tiles: jax.Array


def tile_tokens(num_tokens: int) -> int:
    """The tokens per tile of a step of `num_tokens`."""
    return max(1, num_tokens // _TILES_PER_STEP)


def make_tiles(rows: jax.Array, max_rows: int) -> Tiles:
    """Cuts a step into tiles. rows: (T,) int32 row of each token, equal ones adjacent, -1 for padding at the end."""
    # All pairs compared: trivial next to the step's matrices, and compiled five times faster than scans and nonzero.
    tokens = rows.shape[0]
    size = tile_tokens(tokens)
    index = jnp.arange(tokens, dtype=jnp.int32)
    same_row = rows[:, None] == rows[None, :]
    row_start = jnp.min(jnp.where(same_row, index[None, :], tokens), axis=1)
    is_start = ((index - row_start) % size == 0) & (rows >= 0)
    rank = jnp.sum(jnp.where(index[None, :] < index[:, None], is_start[None, :], False), axis=1, dtype=jnp.int32)
    tile = jnp.arange(min(tokens, tokens // size + max_rows), dtype=jnp.int32)
    chosen = is_start[None, :] & (rank[None, :] == tile[:, None])
    starts = jnp.sum(jnp.where(chosen, index[None, :], 0), axis=1, dtype=jnp.int32)
    return Tiles(starts, jnp.sum(is_start, dtype=jnp.int32))


def write_pages(pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
    """Puts this step's keys and values into their slots.

    pages: (P, 2, K, page_tokens, H), donated
    k, v:  (T, K, H)
    slots: (T,) int32 = page * page_tokens + offset; padding tokens write to page 0, which belongs to no row
    """
    page, offset = slots // pages.shape[3], slots % pages.shape[3]
    # A page's next owner finds what is left in it, and multiplies it by zero: that must not be NaN or infinite.
    kv = jnp.nan_to_num(jnp.stack([k, v], axis=1).astype(pages.dtype))
    if k.shape[0] > _MAX_UPDATES:
        return pages.at[page, :, :, offset].set(kv, mode="promise_in_bounds")
    # XLA:CPU turns a scatter of few rows into an update that reads what it overwrites, and so copies all pages first.
    for i in range(k.shape[0]):
        pages = lax.dynamic_update_slice(pages, kv[i][None, :, :, None], (page[i], 0, 0, offset[i], 0))
    return pages


def paged_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    tiles: Tiles,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of each token over the pages of its row.

    q:          (T, N, H), rotated
    pages:      (P, 2, K, page_tokens, H), this step's keys and values included
    page_table: (B, max_pages) int32; with a window, pages in front of it are not looked at
    rows, positions: (T,) int32
    scale:      of the scores, H ** -0.5 if not given
    softcap:    bounds a score to softcap * tanh(score / softcap); 0 for none (Gemma 2, arXiv:2408.00118)
    window:     tokens that a token sees, itself the last; 0 for all (Mistral, arXiv:2310.06825)
    sinks:      (N,) float32, a score of each head that takes weight and gives no value (gpt-oss, arXiv:2508.10925)
    Returns (T, N * H) in q's dtype; what padding tokens get is unspecified.
    """
    tokens, heads, head_dim = q.shape
    size = tile_tokens(tokens)
    limits = _Limits(softcap, window, jnp.full(heads, -jnp.inf) if sinks is None else sinks.astype(jnp.float32))
    step = _padded(q, rows, positions, head_dim**-0.5 if scale is None else scale, pages.shape[2], size)

    def attend_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        start = tiles.starts[i]
        tile_q, row, position = step.tile(start, size)
        attended = _attend_pages(tile_q, position, pages, page_table[jnp.maximum(row, 0)], limits)
        # What lies behind the row's last token is overwritten by the next tile, which starts right there.
        return lax.dynamic_update_slice(out, attended, (start, 0))

    out = jnp.zeros((tokens + size, heads * head_dim), jnp.float32)
    return lax.fori_loop(0, tiles.num_tiles, attend_tile, out)[:tokens].astype(q.dtype)


class _Queries(NamedTuple):
    """A step's queries, times the scale, with so much padding that a tile can begin at any token.

    q: (T + t, K, G, H) float32; rows, positions: (T + t,), row -1 for padding
    """

    q: jax.Array
    rows: jax.Array
    positions: jax.Array

    def tile(self, start: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries from `start` on, the row of the first, and positions: -1 for the tokens of other rows."""
        row = self.rows[start]
        mine = lax.dynamic_slice(self.rows, (start,), (size,)) == row
        position = jnp.where(mine, lax.dynamic_slice(self.positions, (start,), (size,)), -1)
        return lax.dynamic_slice(self.q, (start, 0, 0, 0), (size, *self.q.shape[1:])), row, position


def _padded(q: jax.Array, rows: jax.Array, positions: jax.Array, scale: float, kv_heads: int, size: int) -> _Queries:
    tokens, heads, head_dim = q.shape
    grouped = (q.astype(jnp.float32) * scale).reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    return _Queries(
        jnp.pad(grouped, ((0, size), (0, 0), (0, 0), (0, 0))),
        jnp.pad(rows, (0, size), constant_values=-1),
        jnp.pad(positions, (0, size)),
    )


class _Limits(NamedTuple):
    """What changes scores and weights; sinks (N,), -inf for none."""

    softcap: float
    window: int
    sinks: jax.Array


def _attend_pages(q: jax.Array, position: jax.Array, pages: jax.Array, table: jax.Array, limits: _Limits) -> jax.Array:
    """One tile over one row's pages. q: (t, K, G, H); position: (t,), -1 to see nothing; table: (max_pages,)."""
    size, kv_heads, group, head_dim = q.shape
    page_tokens = pages.shape[3]
    q = q.transpose(1, 2, 0, 3).reshape(kv_heads, group * size, head_dim)
    limit = jnp.tile(position, group)
    num_pages = jnp.max(position) // page_tokens + 1
    first_page = jnp.int32(0)
    if limits.window:
        lowest = jnp.min(jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position))
        first_page = jnp.maximum(lowest - limits.window + 1, 0) // page_tokens

    def visit(p: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        peak, total, acc = carry
        page = lax.dynamic_index_in_dim(pages, table[p], keepdims=False).astype(jnp.float32)
        scores = jnp.einsum("kmh,ksh->kms", q, page[0])
        if limits.softcap:
            scores = limits.softcap * jnp.tanh(scores / limits.softcap)
        key = p * page_tokens + jnp.arange(page_tokens, dtype=jnp.int32)[None, :]
        seen = key <= limit[:, None]
        if limits.window:
            seen &= key > limit[:, None] - limits.window
        scores = jnp.where(seen[None], scores, -jnp.inf)
        # -1e30 instead of -inf: a query that sees nothing must not make inf - inf.
        new_peak = jnp.maximum(peak, jnp.maximum(jnp.max(scores, axis=-1), -1e30))
        weights = jnp.exp(scores - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + jnp.sum(weights, axis=-1)
        acc = acc * shrink[..., None] + jnp.einsum("kms,ksh->kmh", weights, page[1])
        return new_peak, total, acc

    # A sink is a first key without a value.
    sinks = jnp.repeat(limits.sinks.reshape(kv_heads, group), size, axis=1)
    has_sink = (sinks > -jnp.inf).astype(jnp.float32)
    start = (jnp.maximum(sinks, -1e30), has_sink, jnp.zeros(q.shape, jnp.float32))
    _, total, acc = lax.fori_loop(first_page, num_pages, visit, start)
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(kv_heads, group, size, head_dim).transpose(2, 0, 1, 3).reshape(size, -1)
