"""The CPU kernels as graph operations: calls of handlers that the kernel library registers with XLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..compiler.panels import Packing, packed_outputs, packing_of

Gate = Literal["silu", "gelu_tanh", "gelu"]
"""The activation of a gated layer's gate; gelu is the exact one, by the error function."""

_HANDLERS = {
    "float32": "max_matmul_f32_v2",
    "bfloat16": "max_matmul_bf16_v2",
    "q8_0": "max_matmul_q8_0_v2",
    "q4_0": "max_matmul_q4_0_v1",
    "q4_k": "max_matmul_q4_k_v1",
    "q6_k": "max_matmul_q6_k_v1",
}
_ENCODINGS = tuple(_HANDLERS)
_EPILOGUES: dict[Gate, int] = {"silu": 2, "gelu_tanh": 3, "gelu": 4}


def is_packed(weight: jax.Array) -> bool:
    """Whether a weight lies in panels for the kernels."""
    return weight.dtype == jnp.uint8


def matmul_parts(x: jax.Array, parts: tuple[jax.Array, ...]) -> jax.Array:
    """x @ W with W in parts of several encodings side by side, each of full panels. x: (T, inputs); as `matmul`."""
    return jnp.concatenate([matmul(x, part, packed_outputs(part.shape, x.shape[1])) for part in parts], axis=-1)


def matmul(
    x: jax.Array, weight: jax.Array, outputs: int, bias: jax.Array | None = None, *, gate: Gate | None = None
) -> jax.Array:
    """x @ W with packed W, plus bias, or activation(gate) * up of a gated one.

    x: (T, inputs) float32; weight: as `packed_shape` has it, uint8, which says the encoding; bias: (outputs,) float32
    outputs: columns of the result; a gated matrix has twice as many, and no bias
    Returns (T, outputs) float32, each row the same bits whatever T is.
    """
    assert gate is None or bias is None, "a gated layer with biases is not one call"
    epilogue = np.int64(_EPILOGUES[gate] if gate else 0 if bias is None else 1)
    arguments = (x, weight) if bias is None else (x, weight, bias)
    result = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
    return jax.ffi.ffi_call(_HANDLERS[packing_of(weight.shape)], result)(*arguments, epilogue=epilogue)


def embed(ids: jax.Array, weight: jax.Array, vocab_size: int, width: int) -> jax.Array:
    """The columns `ids` of a packed (width, vocab_size) matrix, as rows. ids: (T,) int32; weight: as in `matmul`.

    Returns (T, width) float32, the very values that the encoding keeps; NaN for an id out of range.
    """
    result = jax.ShapeDtypeStruct((ids.shape[0], width), jnp.float32)
    return jax.ffi.ffi_call("max_embed_v1", result)(ids, weight, outputs=np.int64(vocab_size))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x ** 2) + eps) * weight, row by row. x: (T, D); weight: (D,), all float32."""
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.ffi.ffi_call("max_rms_norm_v1", result)(x, weight, epsilon=np.float32(eps))


def add_rms_norm(x: jax.Array, delta: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x + delta in the memory of x, and its norm as of `rms_norm`. x, delta: (T, D) float32; weight: (D,) float32."""
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = jax.ffi.ffi_call("max_add_rms_norm_v1", (result, result), input_output_aliases={0: 0})
    total, normed = call(x, delta, weight, epsilon=np.float32(eps))
    return total, normed


LAYER_WEIGHTS = ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")
"""What a layer has that `decoder_layers` takes, in its order: packed matrices, each of one part, and no biases."""


def decoder_layers(
    x: jax.Array,
    weights: jax.Array,
    pages: Sequence[jax.Array],
    cos: jax.Array,
    sin: jax.Array,
    page_table: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    *,
    offsets: Sequence[int],
    encodings: Sequence[Packing],
    heads: int,
    mlp_width: int,
    gate: Gate,
    eps: float,
) -> tuple[jax.Array, list[jax.Array]]:
    """All pre-norm layers of a decoder in one call: the bits that their operations give one by one.

    x: (T, D) float32; weights: the region of all layers; pages: of each layer; others as in `attention`
    offsets: of each of LAYER_WEIGHTS in each layer, in the region; encodings: of each packed one
    Returns the residual stream (T, D) behind the layers, in the memory of x, and the pages, updated in place.
    """
    results = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in pages),
    )
    arguments = (x, weights, cos, sin, page_table, rows, positions, slots, *pages)
    first = len(arguments) - len(pages)
    aliases = {0: 0, **{first + layer: 1 + layer for layer in range(len(pages))}}
    y, *new_pages = jax.ffi.ffi_call("max_decoder_layers_v1", results, input_output_aliases=aliases)(
        *arguments,
        offsets=np.array(offsets, np.int64),
        encodings=np.array([_ENCODINGS.index(encoding) for encoding in encodings], np.int64),
        heads=np.int64(heads),
        mlp_width=np.int64(mlp_width),
        gate=np.int64(_EPILOGUES[gate]),
        scale=np.float32(pages[0].shape[4] ** -0.5),
        epsilon=np.float32(eps),
    )
    return y, new_pages


def lazy_zeros(like: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """Zeros of these shapes and dtypes in memory that is taken when it is written."""
    return list(jax.ffi.ffi_call("max_lazy_zeros_v1", list(like))())


def argmax(x: jax.Array) -> jax.Array:
    """The first of the largest in each row, or -1 where one is NaN. x: (R, V) float32; (R,) int32 out."""
    return jax.ffi.ffi_call("max_argmax_v2", jax.ShapeDtypeStruct(x.shape[:1], jnp.int32))(x)


def sample(
    logits: jax.Array, mask: jax.Array, history: jax.Array, bias: jax.Array, settings: jax.Array, numbers: jax.Array,
    *, num_ids: int,
) -> jax.Array:  # fmt: skip
    """`sampler.sample_full` in the kernel: the same arguments; (num_ids,) int32 out, zeros behind the rows."""
    result = jax.ShapeDtypeStruct((num_ids,), jnp.int32)
    return jax.ffi.ffi_call("max_sample_v2", result)(logits, mask, history, bias, settings, numbers)


def logprobs(logits: jax.Array, ids: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`sampler.logprobs` in the kernel: the same arguments and results."""
    rows = logits.shape[0]
    results = (
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((rows, num_top), jnp.int32),
        jax.ShapeDtypeStruct((rows, num_top), jnp.float32),
    )
    chosen, top_ids, top = jax.ffi.ffi_call("max_logprobs_v2", results)(logits, ids)
    return chosen, top_ids, top


MAX_HEAD_DIM = 1024
"""Dimensions of a head that the attention kernel takes at most."""


def why_no_attention(head_dim: int) -> str | None:
    """What the attention kernel cannot compute of a model, in words; None where it takes it."""
    if head_dim > MAX_HEAD_DIM:
        return f"heads have {head_dim} dimensions, and the kernel takes at most {MAX_HEAD_DIM}"
    return None


def attention(
    qkv: jax.Array,
    pages: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    page_table: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Rotates, writes this step's keys and values to their slots, and attends over the pages of each token's row.

    qkv: (T, (N + 2K)H) float32; pages: (P, 2, K, page_tokens, H), updated in place; others as in paged_attention
    Returns (T, N H) float32 and the pages.
    """
    kv_heads, head_dim = pages.shape[2], pages.shape[4]
    width = qkv.shape[1] - 2 * kv_heads * head_dim
    results = (jax.ShapeDtypeStruct((qkv.shape[0], width), jnp.float32), jax.ShapeDtypeStruct(pages.shape, pages.dtype))
    call = jax.ffi.ffi_call("max_attention_v3", results, input_output_aliases={1: 1})
    arguments = (qkv, pages, cos, sin, page_table, rows, positions, slots, *(() if sinks is None else (sinks,)))
    factor = head_dim**-0.5 if scale is None else scale
    settings = {"scale": np.float32(factor), "softcap": np.float32(softcap), "window": np.int64(window)}
    out, new_pages = call(*arguments, **settings)
    return out, new_pages
