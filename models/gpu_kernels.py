"""The GPU kernels as graph operations; on other machines their IR is interpreted."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..compiler.graph import TensorType
from ..compiler.triton.call import triton_call
from ..compiler.triton.paged_attention import (
    Attention,
    combine_kernel,
    max_tiles,
    paged_attention_kernel,
    tokens_per_tile,
)
from ..compiler.triton.rms_norm import rms_norm_kernel
from ..compiler.triton.rope_kv_write import rope_kv_write_kernel
from ..compiler.triton.sample import argmax_kernel, highest_kernel, sample_kernel
from .layers import Norms


def rope_kv_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slots: jax.Array,
    pool: jax.Array,
    *,
    layer: int,
    num_pages: int,
    num_heads: int,
) -> tuple[jax.Array, jax.Array]:
    """Rotates queries and keys, and puts keys and values into the layer's pages.

    qkv:      (T, (N + 2K) H) float32 or bfloat16: queries, keys and values
    cos, sin: (T, H / 2) float32, of the NeoX order
    slots:    (T,) int32 = page * page_tokens + offset, pages counted from the layer's first; padding has 0
    pool:     (L * num_pages, 2, K, page_tokens, H) float32 or bfloat16, donated; layer l owns pages from l * num_pages
    Returns the rotated queries (T, N, H) in qkv's dtype, and the pool in its own memory.
    """
    kernel = rope_kv_write_kernel(_type(qkv), _type(pool), num_heads)
    q, pool = triton_call(kernel, qkv, cos, sin, slots, _first_page(layer, num_pages), pool)
    return q, pool


def make_tiles(rows: jax.Array, positions: jax.Array, *, max_rows: int, group: int) -> jax.Array:
    """Cuts a step into the tiles of `paged_attention`, once for all layers of as many query heads per key head.

    rows, positions: (T,) int32; equal rows adjacent and their positions ascending, -1 for padding at the end
    max_rows: rows that a step may have, its padding aside
    Returns (W, 4) int32: row, first token, number of tokens, last position; unused ones see nothing and have no token.
    """
    # All pairs compared: XLA makes a few kernels of it, and many of scans.
    tokens, size = rows.shape[0], tokens_per_tile(rows.shape[0], group)
    index = jnp.arange(tokens, dtype=jnp.int32)
    same_row = rows[:, None] == rows[None, :]
    row_start = jnp.min(jnp.where(same_row, index[None, :], tokens), axis=1)
    row_stop = jnp.max(jnp.where(same_row, index[None, :] + 1, 0), axis=1)
    is_start = (index - row_start) % size == 0
    before = jnp.sum((index[None, :] < index[:, None]) & is_start[None, :], axis=1, dtype=jnp.int32)
    tile = jnp.arange(max_tiles(tokens, group, max_rows), dtype=jnp.int32)
    count = jnp.minimum(row_stop - index, size)
    last = jnp.where(rows < 0, -1, positions + count - 1)
    facts = jnp.stack([jnp.maximum(rows, 0), index, count, last + 1], axis=1)
    chosen = is_start[None, :] & (before[None, :] == tile[:, None])
    table = jnp.sum(jnp.where(chosen[:, :, None], facts[None], 0), axis=1, dtype=jnp.int32)
    return table - jnp.array([0, 0, 0, 1], jnp.int32)


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    tiles: jax.Array,
    *,
    layer: int,
    num_pages: int,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of each token over the pages of its row, of which only the visible ones are read.

    q:          (T, N, H) float32 or bfloat16, rotated
    pool:       as of `rope_kv_write`, this step's keys and values included
    page_table: (B, max_pages) int32, pages counted from the layer's first
    positions:  (T,) int32
    tiles:      of `make_tiles`
    scale, softcap, window, sinks: as in models/paged_attention.py
    Returns (T, N * H) in q's dtype; zeros for padding tokens, unless there are sinks.
    """
    about = Attention(
        _type(q), _type(pool), _type(page_table), tiles.shape[0], q.shape[2] ** -0.5 if scale is None else scale,
        softcap, window, sinks is not None,
    )  # fmt: skip
    optional = () if sinks is None else (sinks.astype(jnp.float32),)
    first_page = _first_page(layer, num_pages)
    parts = triton_call(paged_attention_kernel(about), q, pool, page_table, positions, tiles, first_page, *optional)
    return parts[0] if about.splits == 1 else triton_call(combine_kernel(about), *parts)[0]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """As `layers.rms_norm`."""
    return triton_call(rms_norm_kernel(_type(x), _type(weight), eps, adds=False), x, weight)[0]


def add_rms_norm(x: jax.Array, delta: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """As `layers.add_rms_norm`."""
    total, normed = triton_call(rms_norm_kernel(_type(x), _type(weight), eps, adds=True), x, delta, weight)
    return total, normed


NORMS = Norms(rms_norm, add_rms_norm)


def argmax(logits: jax.Array, num_ids: int) -> jax.Array:
    """As `sampler.sample_greedy`, with zeros behind the rows: (num_ids,) int32."""
    return triton_call(argmax_kernel(_type(logits), num_ids), logits)[0]


def draw(logits: jax.Array, settings: jax.Array, numbers: jax.Array, u: jax.Array, *, num_ids: int = 0) -> jax.Array:
    """As `sampler.draw`, with zeros behind the rows where `num_ids` are asked for."""
    kernel = sample_kernel(_type(logits), num_ids or logits.shape[0])
    return triton_call(kernel, logits, settings, numbers, u)[0]


def logprobs(logits: jax.Array, ids: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `sampler.logprobs`."""
    kernel = highest_kernel(_type(logits), ids.shape[0], num_top)
    top_ids, top, chosen, total = triton_call(kernel, logits, ids)
    peak, normalizer, limit = top[:, 0], jnp.log(total), jnp.finfo(jnp.float32).max
    told = jnp.maximum(top - peak[:, None] - normalizer[:, None], -limit)
    return jnp.maximum(chosen - peak - normalizer, -limit), top_ids, told


def _first_page(layer: int, num_pages: int) -> jax.Array:
    # An operand, not a constant of the IR: so all layers share one compiled kernel.
    return jnp.array([layer * num_pages], jnp.int32)


def _type(x: jax.Array) -> TensorType:
    return TensorType(str(x.dtype), x.shape)
