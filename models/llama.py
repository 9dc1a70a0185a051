"""Llama (Meta, arXiv:2302.13971, 2407.21783): pre-norm decoder with GQA, rotary positions and SwiGLU.

HF: transformers 5.x `modeling_llama.LlamaForCausalLM`. The projections are fused (qkv, gate + up) and matrices are
(inputs, outputs). Attention is passed in: the ragged paged one in serving graphs, a dense one in training.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ..compiler.collectives import all_gather
from .kernels import Gate
from .layers import NORMS, PACKED_NORMS, Norms, embed, is_packed, linear, reduced_linear, rms_norm, swiglu
from .llama_config import Config

Attend = Callable[[jax.Array], jax.Array]
"""Fused projections (T, (N + 2K)H) -> attention's output (T, N·H): rotates, keeps keys and values, attends."""


class Block(nnx.Module):
    """One decoder layer, or what one of several devices computes of it."""

    layer_gate: Gate | None = "silu"  # see KernelLayers

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32, devices: int = 1):
        d, f = config.hidden_size, config.intermediate_size
        qkv = config.query_width + 2 * config.kv_width
        self.norm_eps, self.devices = config.norm_eps, devices
        self.widths = (qkv, d, f)

        def matrix(inputs: int, outputs: int, scale: float = 1.0) -> nnx.Param:
            # Residual projections start smaller with depth (GPT-2, section 2.3).
            return nnx.Param(0.02 * scale * jax.random.normal(rngs.params(), (inputs, outputs), dtype))

        residual = (2 * config.num_layers) ** -0.5
        self.input_norm = nnx.Param(jnp.ones((d,), dtype))
        self.qkv = matrix(d, qkv)
        self.o = matrix(config.query_width, d, residual)
        self.post_norm = nnx.Param(jnp.ones((d,), dtype))
        self.gate_up = matrix(d, 2 * f)
        self.down = matrix(f, d, residual)
        self.qkv_bias = nnx.Param(jnp.zeros((qkv,), dtype)) if config.attention_bias else None
        self.o_bias = nnx.Param(jnp.zeros((d,), dtype)) if config.attention_bias else None
        self.gate_up_bias = nnx.Param(jnp.zeros((2 * f,), dtype)) if config.mlp_bias else None
        self.down_bias = nnx.Param(jnp.zeros((d,), dtype)) if config.mlp_bias else None

    def __call__(
        self, x: jax.Array, attend: Attend, rows: jax.Array | None = None, norms: Norms | None = None
    ) -> jax.Array:
        """x: (T, D) residual stream; same shape out, or (R, D) where only the tokens `rows`, (R,) int32, are wanted.

        norms: what computes them, where it is not to follow from how the matrices are packed
        """
        qkv, d, f = self.widths
        norms = norms or (PACKED_NORMS if is_packed(self.qkv.get_value()) else NORMS)
        h = norms.alone(x, self.input_norm[...], self.norm_eps)
        h = attend(linear(h, self.qkv.get_value(), qkv, _value(self.qkv_bias)))
        if rows is not None:  # behind attention, tokens know nothing of each other
            x, h = x[rows], h[rows]
        delta = reduced_linear(h, self.o.get_value(), d, _value(self.o_bias), self.devices)
        x, h = norms.behind_sum(x, delta, self.post_norm[...], self.norm_eps)
        h = swiglu(h, self.gate_up.get_value(), f, _value(self.gate_up_bias))
        return x + reduced_linear(h, self.down.get_value(), d, _value(self.down_bias), self.devices)


class Llama(nnx.Module):
    """LlamaForCausalLM; parameter paths are the weight names of `Config.weights`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32, devices: int = 1):
        """devices: of the mesh over which the model is split; `config` then is that of one part, `Config.part`."""
        self.devices = devices
        self.norm_eps, self.vocab_size, self.hidden_size = config.norm_eps, config.vocab_size, config.hidden_size
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
        self.blocks = nnx.List(
            [Block(config, rngs=rngs, dtype=dtype, devices=devices) for _ in range(config.num_layers)]
        )
        self.norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        # One assignment: nnx settles at the first one whether an attribute is data.
        self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape[::-1], dtype)) if not config.tied else None

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """tokens: (T,) int32; (T, D) out."""
        return embed(tokens, self.embed.get_value(), self.vocab_size, self.hidden_size, self.devices)

    def logits(self, x: jax.Array) -> jax.Array:
        """x: (R, D) residual stream of the rows that want logits; (R, V) float32 out."""
        weight = (self.embed if self.head is None else self.head).get_value()
        packed = is_packed(weight)
        h = rms_norm(x, self.norm[...], self.norm_eps, use_kernels=packed)
        if packed:
            return linear(h, weight, self.vocab_size)
        if self.head is None:
            logits = jnp.einsum("rd,vd->rv", h, weight, preferred_element_type=jnp.float32)
        else:
            logits = jnp.matmul(h, weight, preferred_element_type=jnp.float32)
        return logits if logits.shape[1] == self.vocab_size else all_gather(logits, self.devices)


def _value(param: nnx.Param | None) -> jax.Array | None:
    return None if param is None else param[...]
