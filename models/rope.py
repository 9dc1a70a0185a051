"""Rotary position embeddings: the kinds that checkpoints ask for, as data and as graph operations.

Sources: RoPE arXiv:2104.09864; linear and dynamic NTK scaling as in transformers 5.x `modeling_rope_utils`;
YaRN arXiv:2309.00071; llama3 scaling from the Llama 3.1 reference implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .. import ModelError
from .config_keys import number, optional

if TYPE_CHECKING:
    import jax

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "factors"]


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a checkpoint.

    scale:   the factor on cos and sin (YaRN's attention factor)
    factors: what the rotation of each pair of dimensions is divided by, as GGUF files carry llama3 scaling
    """

    dim: int
    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    scale: float = 1.0
    factors: tuple[float, ...] = ()

    @staticmethod
    def from_hf(raw: dict[str, Any], head_dim: int) -> Rope:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before); raises ModelError."""
        given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise ModelError(
                "rope_parameters in config.json is not one flat object",
                "Checkpoints with a rotary embedding per kind of layer are not supported here.",
            )
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in get_args(RopeKind):
            raise ModelError(
                f"rope type {kind!r} is not known",
                f"Known ones: {', '.join(get_args(RopeKind))}. Check rope_scaling in config.json.",
            )
        share = given.get("partial_rotary_factor", 1)
        if head_dim % 2 or share not in (None, 1):
            raise ModelError(
                f"head_dim {head_dim} with partial_rotary_factor {share} is not supported",
                "Only whole heads of an even number of dimensions are rotated; use another checkpoint.",
            )
        return _parse(kind, given, raw, head_dim)


def _parse(kind: RopeKind, given: dict[str, Any], raw: dict[str, Any], dim: int) -> Rope:
    theta = number(given, "rope_theta", number(raw, "rope_theta", 10000.0))
    if kind == "default":
        return Rope(dim, theta)
    max_position = optional(raw, "max_position_embeddings", 2048)
    if kind == "dynamic":
        return Rope(dim, theta, kind, number(given, "factor"), original_max_position=max_position)
    if kind == "linear":
        return Rope(dim, theta, kind, number(given, "factor"))
    if kind == "factors":
        return Rope(dim, theta, kind, factors=_factors(given, dim))
    # Phi-3 keeps the length beside rope_scaling; transformers lets that one win.
    key = "original_max_position_embeddings"
    original = optional(raw, key, optional(given, key, max_position))
    if kind == "llama3":
        low, high = number(given, "low_freq_factor"), number(given, "high_freq_factor")
        if low >= high:
            raise ModelError(
                f"rope_scaling: low_freq_factor {low} is not below high_freq_factor {high}",
                "Correct rope_scaling in config.json; Llama 3 has 1 and 4.",
            )
        return Rope(dim, theta, kind, number(given, "factor"), original, low, high)
    # A null factor is DeepSeek's way to ask for the ratio of the two lengths.
    factor = max_position / original if given.get("factor", 0) is None else number(given, "factor")
    return Rope(
        dim,
        theta,
        kind,
        factor,
        original,
        beta_fast=number(given, "beta_fast", 32),
        beta_slow=number(given, "beta_slow", 1),
        truncate=bool(given.get("truncate", True)),
        scale=_yarn_scale(given, factor),
    )


def _factors(given: dict[str, Any], dim: int) -> tuple[float, ...]:
    values = given.get("factors")
    if not isinstance(values, list) or len(values) != dim // 2 or not all(_is_factor(value) for value in values):
        raise ModelError(
            f"rope_scaling: factors are not {dim // 2} positive numbers, one for each pair of dimensions",
            "Is the file complete? Convert the checkpoint again, or use the one that it was made from.",
        )
    return tuple(values)


def _is_factor(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _yarn_scale(given: dict[str, Any], factor: float) -> float:
    """YaRN's attention factor: given, from the two mscales (DeepSeek), or 0.1 ln(factor) + 1."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return number(given, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(number(given, "mscale")) / mscale(number(given, "mscale_all_dim"))
    return mscale(1.0)


def inverse_frequencies(rope: Rope) -> np.ndarray:
    """The rotation per position of each pair, (dim / 2,) float32; for `dynamic`, that of short rows."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    # Float32 powers differ between vector instruction sets; a float64 one, rounded, is what torch gives too.
    plain = np.float32(1) / (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "factors":
        return plain / np.array(rope.factors, np.float32)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    return plain


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / plain
    slow = rope.original_max_position / rope.low_freq_factor
    fast = rope.original_max_position / rope.high_freq_factor
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    medium = (1 - blend) * plain / rope.factor + blend * plain
    scaled = np.where(wavelength > slow, plain / rope.factor, plain)
    return np.where((wavelength >= fast) & (wavelength <= slow), medium, scaled).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    def pair_of(rotations: float) -> float:
        """The pair that makes this many rotations over the original context."""
        return (rope.dim * math.log(rope.original_max_position / (rotations * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    span = (high - low) or 0.001
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / span, 0, 1)
    return (plain / rope.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def rope_tables(rope: Rope, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the tokens' rotations.

    positions: (T,) int32
    lengths:   (T,) int32, length of each token's row after this step; only `dynamic` looks at it: as in transformers,
               the base grows once a row is longer than the original context, for the tokens computed then
    Returns two (T, dim / 2) float32 arrays.
    """
    import jax.numpy as jnp

    frequencies = jnp.asarray(inverse_frequencies(rope))[None, :]
    if rope.kind == "dynamic":
        limit = rope.original_max_position
        grown = jnp.maximum(lengths, limit).astype(jnp.float32)
        growth = rope.factor * grown / limit - (rope.factor - 1)
        theta = rope.theta * growth ** (rope.dim / (rope.dim - 2))
        exponents = jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim
        frequencies = 1.0 / theta[:, None] ** exponents[None, :]
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the two halves of each head (the NeoX order that HF checkpoints use), computed in float32.

    x: (T, heads, dim); cos, sin: (T, dim / 2). Same shape and dtype out.
    """
    import jax.numpy as jnp

    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
