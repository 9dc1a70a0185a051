"""Layers that architectures share, as pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..compiler.collectives import all_reduce, device_index
from . import kernels

Matrix = jax.Array | tuple[jax.Array, ...]
"""The weight of a projection: (inputs, outputs), packed for the CPU kernels, or several packed ones side by side."""


def is_packed(weight: Matrix) -> bool:
    """Whether a projection runs on the CPU kernels; what stands between two such then does so too."""
    return isinstance(weight, tuple) or kernels.is_packed(weight)


def embed(ids: jax.Array, weight: jax.Array, vocab_size: int, width: int, devices: int = 1) -> jax.Array:
    """The rows of an embedding. ids: (T,) int32; weight: (vocab_size, width), or packed as (width, vocab_size).

    devices: of a mesh; each has all rows, or an equal share of them in order
    """
    if kernels.is_packed(weight):
        return kernels.embed(ids, weight, vocab_size, width)
    rows = weight.shape[0]
    if rows == vocab_size:
        return jnp.take(weight, ids, axis=0)
    own = ids - device_index() * rows
    is_here = (own >= 0) & (own < rows)
    found = jnp.where(is_here[:, None], jnp.take(weight, jnp.where(is_here, own, 0), axis=0), 0)
    return all_reduce(found, devices)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, use_kernels: bool = False) -> jax.Array:
    """Root-mean-square norm, computed in float32. x: (T, D); weight: (D,). Source: arXiv:1910.07467."""
    if use_kernels:
        return kernels.rms_norm(x, weight, eps)
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def add_rms_norm(
    x: jax.Array, delta: jax.Array, weight: jax.Array, eps: float, *, use_kernels: bool = False
) -> tuple[jax.Array, jax.Array]:
    """x + delta and its norm: what follows a residual projection. x, delta: (T, D)."""
    if use_kernels:
        return kernels.add_rms_norm(x, delta, weight, eps)
    total = x + delta
    return total, rms_norm(total, weight, eps)


class Norms(NamedTuple):
    """How a layer's norms are computed: `rms_norm` and `add_rms_norm` without their setting."""

    alone: Callable[[jax.Array, jax.Array, float], jax.Array]
    behind_sum: Callable[[jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]


NORMS = Norms(rms_norm, add_rms_norm)
PACKED_NORMS = Norms(partial(rms_norm, use_kernels=True), partial(add_rms_norm, use_kernels=True))


def linear(x: jax.Array, weight: Matrix, outputs: int, bias: jax.Array | None = None) -> jax.Array:
    """x: (T, inputs); weight: (inputs, outputs), or packed; bias: (outputs,). Accumulates in float32, as x."""
    if isinstance(weight, tuple):
        y = kernels.matmul_parts(x, weight)
    elif kernels.is_packed(weight):
        return kernels.matmul(x, weight, outputs, bias)
    else:
        y = jnp.matmul(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)
    return y if bias is None else y + bias


def reduced_linear(x: jax.Array, weight: Matrix, outputs: int, bias: jax.Array | None, devices: int) -> jax.Array:
    """`linear` where each device of a mesh has some of the inputs, and of the weight what they are multiplied by."""
    if devices == 1:
        return linear(x, weight, outputs, bias)
    y = all_reduce(linear(x, weight, outputs), devices)
    return y if bias is None else y + bias


def swiglu(x: jax.Array, weight: Matrix, outputs: int, bias: jax.Array | None = None) -> jax.Array:
    """silu(gate) * up of the fused projection. weight: (inputs, 2 * outputs), or packed. Source: arXiv:2002.05202."""
    if not isinstance(weight, tuple) and kernels.is_packed(weight) and bias is None:
        return kernels.matmul(x, weight, outputs, gate="silu")
    gate, up = jnp.split(linear(x, weight, 2 * outputs, bias), 2, axis=-1)
    return jax.nn.silu(gate) * up


def split_heads(qkv: jax.Array, heads: int, kv_heads: int, head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The fused projection (T, (N + 2K)H) as q (T, N, H), k (T, K, H) and v (T, K, H)."""
    q, k, v = jnp.split(qkv, [heads * head_dim, (heads + kv_heads) * head_dim], axis=-1)
    tokens = qkv.shape[0]
    return (
        q.reshape(tokens, heads, head_dim),
        k.reshape(tokens, kv_heads, head_dim),
        v.reshape(tokens, kv_heads, head_dim),
    )
