"""The whole model on whole rows, with dense causal attention: for training and evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..layers import split_heads
from ..llama import Llama
from ..llama_config import Config
from ..rope import rope_tables, rotate

BLOCK = 256
"""Queries a block: the keys after a block are skipped, and its scores stay in the processor's cache."""


def hidden_states(model: Llama, config: Config, tokens: jax.Array) -> jax.Array:
    """tokens: (B, T) int32; the residual stream (B·T, D) out, ready for `Llama.logits`."""
    batch, length = tokens.shape
    positions = jnp.arange(length, dtype=jnp.int32)
    cos, sin = rope_tables(config.rope, positions, jnp.full((length,), length, jnp.int32))
    cos, sin = jnp.tile(cos, (batch, 1)), jnp.tile(sin, (batch, 1))

    def attend(qkv: jax.Array) -> jax.Array:
        q, k, v = split_heads(qkv, config.num_heads, config.num_kv_heads, config.head_dim)
        group = config.num_heads // config.num_kv_heads
        q = rotate(q, cos, sin).reshape(batch, length, config.num_kv_heads, group, config.head_dim)
        k = rotate(k, cos, sin).reshape(batch, length, config.num_kv_heads, config.head_dim)
        v = v.reshape(batch, length, config.num_kv_heads, config.head_dim)
        blocks = []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            scores = jnp.einsum("btkgh,bskh->bkgts", q[:, start:end], k[:, :end]) * config.head_dim**-0.5
            causal = positions[start:end, None] >= positions[None, :end]
            probabilities = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(scores.dtype).min), axis=-1)
            blocks.append(jnp.einsum("bkgts,bskh->btkgh", probabilities, v[:, :end]))
        mixed = jnp.concatenate(blocks, axis=1)
        return mixed.reshape(batch * length, config.query_width)

    x = model.embed_tokens(tokens.reshape(-1))
    for block in model.blocks:
        x = block(x, attend)
    return x
