"""The kernel that rotates queries and keys and puts keys and values into their pages, in one pass over qkv."""

from __future__ import annotations

import functools

from ..graph import TensorType
from . import operations as op
from .block import Block
from .kernel import Kernel, build

_HEADS_PER_PROGRAM = 8


@functools.cache
def rope_kv_write_kernel(qkv: TensorType, pool: TensorType, num_heads: int) -> Kernel:
    """The kernel for qkv (T, (N + 2K) H) and pool (pages, 2, K, page_tokens, H).

    Operands: qkv; cos, sin (T, H / 2) float32; slots (T,) int32 = page * page_tokens + offset, pages counted from
    first_page (1,) int32; pool. Results: the rotated queries (T, N, H) in qkv's dtype, and the pool in its own memory.
    """
    tokens = qkv.shape[0]
    _, _, kv_heads, page_tokens, head_dim = pool.shape
    heads, half = num_heads + 2 * kv_heads, head_dim // 2
    lanes = 1 << (half - 1).bit_length()

    def body(
        qkv_at: Block, cos_at: Block, sin_at: Block, slots_at: Block, first_at: Block, _: Block, q_at: Block, to: Block
    ) -> None:
        token = op.program_id(0)
        head = (op.program_id(1) * _HEADS_PER_PROGRAM + op.arange(_HEADS_PER_PROGRAM))[:, None]
        lane = op.arange(lanes)[None, :]
        inside = (head < heads) & (lane < half)
        source = qkv_at + (token * heads + head) * head_dim + lane
        first, second = (op.load(source + at, inside).to("float32") for at in (0, half))
        angle, known = token * half + lane, lane < half
        cos, sin = op.load(cos_at + angle, known), op.load(sin_at + angle, known)
        is_value = head >= num_heads + kv_heads
        rotated = op.where(is_value, first, first * cos - second * sin)
        rotated_second = op.where(is_value, second, second * cos + first * sin)

        slot = op.load(slots_at + token)
        # Keys and values of all heads lie behind each other in a page. A pool may have more than 2**31 elements.
        page = op.load(first_at) + slot // page_tokens
        row = page.to("int64") * (2 * kv_heads * page_tokens) + (slot % page_tokens).to("int64")
        kv_row = row + ((head - num_heads) * page_tokens).to("int64")
        q_to, kv_to = q_at + (token * num_heads + head) * head_dim + lane, to + kv_row * head_dim + lane
        is_query, is_kv = inside & (head < num_heads), inside & (head >= num_heads)
        for at, part in ((0, rotated), (half, rotated_second)):
            op.store(q_to + at, part.to(qkv.dtype), is_query)  # type: ignore[arg-type]
            op.store(kv_to + at, part.to(pool.dtype), is_kv)  # type: ignore[arg-type]

    angles = TensorType("float32", (tokens, half))
    operands = (qkv, angles, angles, TensorType("int32", (tokens,)), TensorType("int32", (1,)), pool)
    results = (TensorType(qkv.dtype, (tokens, num_heads, head_dim)), pool)
    grid = (tokens, -(-heads // _HEADS_PER_PROGRAM), 1)
    return build("rope_kv_write", operands, results, body, grid=grid, aliases=[(5, 1)])
