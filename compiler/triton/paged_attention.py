"""The kernel of ragged paged attention: online softmax over the keys that a tile of one row's tokens can see.

A tile has the queries of all heads of one group, so that each key is read once for them. Where a step has few tiles,
several programs share the keys of one, and a second kernel puts their parts together. Sources: PagedAttention,
arXiv:2309.06180; online softmax, arXiv:1805.02867; splitting over keys, Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import NamedTuple

from ..graph import TensorType
from . import operations as op
from .block import Block, Dtype
from .kernel import Kernel, build

_LOG2_E = math.log2(math.e)
_NOTHING = -1e30  # the largest score where there is none yet: -inf would make inf - inf
_SMALLEST_DOT = 16
_DECODE_TOKENS = 64  # steps of at most this many tokens have tiles of the smallest size
_PREFILL_QUERIES = 64  # per tile: what a warp group multiplies at once
_PROGRAMS = 512  # wanted, some for each of 132 multiprocessors: below, the keys of a tile are split
_MAX_SPLITS = 8
_KEY_BYTES = 16384  # of the keys that a program holds at a time; as many of values, twice for what is on its way
_HEADS_PER_COMBINE = 4


@dataclass(frozen=True)
class Attention:
    """What an attention is compiled for.

    scale:   of the scores
    softcap: bounds a score to softcap * tanh(score / softcap); 0 for none
    window:  tokens that a token sees, itself the last; 0 for all
    """

    q: TensorType
    pool: TensorType
    page_table: TensorType
    num_tiles: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    has_sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.pool.shape[2]

    @property
    def dtype(self) -> Dtype:
        """What queries, keys and weights are multiplied in."""
        return "bfloat16" if self.q.dtype == self.pool.dtype == "bfloat16" else "float32"

    @property
    def lanes(self) -> int:
        return max(_power_of_two(self.q.shape[2]), _SMALLEST_DOT)

    @property
    def queries(self) -> int:
        """Rows of a program's products: heads of a group times tokens of a tile, filled up."""
        return max(_power_of_two(tokens_per_tile(self.q.shape[0], self.group) * self.group), _SMALLEST_DOT)

    @property
    def keys(self) -> int:
        """Keys that a program looks at a time."""
        return max(_SMALLEST_DOT, min(64, _KEY_BYTES // (self.lanes * (2 if self.dtype == "bfloat16" else 4))))

    @property
    def warps(self) -> int:
        """Large float32 tiles do not fit the registers of four warps: for sm_90 they spill 1700 bytes a thread."""
        return 8 if self.dtype == "float32" and self.queries > _SMALLEST_DOT else 4

    @property
    def splits(self) -> int:
        """Programs that share the keys of a tile."""
        wanted = _PROGRAMS // (self.num_tiles * self.pool.shape[2])
        return min(_power_of_two(wanted + 1) // 2, _MAX_SPLITS) if wanted > 1 else 1


def tokens_per_tile(tokens: int, group: int) -> int:
    """Tokens of a tile in a step of `tokens` tokens, for `group` query heads per key head."""
    queries = _SMALLEST_DOT if tokens <= _DECODE_TOKENS else _PREFILL_QUERIES
    return max(1, queries // _power_of_two(group))


def max_tiles(tokens: int, group: int, max_rows: int) -> int:
    """The most tiles that a step can have; its padding tokens count as a row."""
    return min(tokens, tokens // tokens_per_tile(tokens, group) + max_rows + 1)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


class _State(NamedTuple):
    """The online softmax of a tile: largest score so far and sum of weights (queries,), sum of values."""

    peak: Block
    total: Block
    acc: Block


@functools.cache
def paged_attention_kernel(about: Attention) -> Kernel:
    """Attention of every tile over the pages of its row.

    Operands: q (T, N, H); pool (pages, 2, K, page_tokens, H); page_table (B, max_pages), positions (T,), tiles (W, 4),
    each its row, first token, number of tokens and last position, -1 for none, and first_page (1,), all int32;
    sinks (N,) float32 where there are any.
    Results: (T, N H) in q's dtype; or with splits S their parts: sums of values (S, T, N, H), largest scores in units
    of log 2 and sums of weights (S, T, N), all float32.
    """
    tokens, heads, _ = about.q.shape
    kv_heads, splits = about.pool.shape[2], about.splits

    def body(*pointers: Block) -> None:
        q_at, pool_at, table_at, positions_at, tiles_at, first_page_at, *rest = pointers
        sinks_at = rest.pop(0) if about.has_sinks else None
        number, kv_head, split = (op.program_id(axis) for axis in range(3))
        tile = _Tile.load(about, tiles_at, number, kv_head)
        q = op.load(tile.elements(q_at, tile.at), tile.inside).to(about.dtype)
        position = op.load(positions_at + tile.token, tile.is_real, -1)

        table_at = table_at + tile.row * about.page_table.shape[1]
        view = _View(about, pool_at, table_at, op.load(first_page_at), kv_head, tile.last)
        state = _beginning(about, None if sinks_at is None else op.load(sinks_at + tile.head, tile.is_real), split)
        first_key = _first_key(about, position, tile.is_real, tile.last)
        start, stop = _share(first_key // about.keys, (tile.last + about.keys) // about.keys, split, splits)
        state = _State(
            *op.loop(start, stop, state, lambda i, *now: _visit(about, view, q, position, first_key, i, _State(*now)))
        )
        if splits == 1:
            result = state.acc / op.maximum(state.total, 1e-30)[:, None]
            op.store(tile.elements(rest[0], tile.at), result.to(about.q.dtype), tile.inside)  # type: ignore[arg-type]
            return
        at = (split * tokens + tile.token) * heads + tile.head
        op.store(tile.elements(rest[0], at), state.acc, tile.inside)
        op.store(rest[1] + at, state.peak, tile.is_real)
        op.store(rest[2] + at, state.total, tile.is_real)

    operands, results = _types(about)
    grid = (about.num_tiles, kv_heads, splits)
    return build("paged_attention", operands, results, body, grid=grid, num_warps=about.warps, num_stages=3)


def _types(about: Attention) -> tuple[list[TensorType], list[TensorType]]:
    """Of operands and results."""
    tokens, heads, head_dim = about.q.shape
    integers = [about.page_table.shape, (tokens,), (about.num_tiles, 4), (1,)]
    operands = [about.q, about.pool, *(TensorType("int32", shape) for shape in integers)]
    operands += [TensorType("float32", (heads,))] * about.has_sinks
    whole = TensorType(about.q.dtype, (tokens, heads * head_dim))
    return operands, [whole] if about.splits == 1 else list(_parts(about))


class _Tile(NamedTuple):
    """The queries of a program: of its row, and for each of `queries` which token, head and place among all it has."""

    row: Block
    last: Block
    """The last position that the tile sees."""
    token: Block
    head: Block
    at: Block
    is_real: Block
    inside: Block
    """Whether there is such a query, (queries,), and whether it has such an element, (queries, lanes)."""
    lane: Block
    head_dim: int

    @staticmethod
    def load(about: Attention, tiles_at: Block, number: Block, kv_head: Block) -> _Tile:
        tokens, heads, head_dim = about.q.shape
        row, first, count, last = (op.load(tiles_at + (number * 4 + i)) for i in range(4))
        query, lane = op.arange(about.queries), op.arange(about.lanes)[None, :]
        member = query // about.group
        is_real = member < op.minimum(count, tokens_per_tile(tokens, about.group))
        token, head = first + member, kv_head * about.group + query % about.group
        at = token * heads + head
        return _Tile(row, last, token, head, at, is_real, is_real[:, None] & (lane < head_dim), lane, head_dim)

    def elements(self, pointer: Block, at: Block) -> Block:
        """Of the queries at these places behind the pointer."""
        return pointer + (at * self.head_dim)[:, None] + self.lane


def _beginning(about: Attention, sink: Block | None, split: Block) -> _State:
    """Before any key; a sink is a first one without a value, of the first split."""
    state = _State(
        op.full((about.queries,), _NOTHING, "float32"),
        op.full((about.queries,), 0, "float32"),
        op.full((about.queries, about.lanes), 0, "float32"),
    )
    if sink is None:
        return state
    return state._replace(
        peak=op.where(split < 1, sink * _LOG2_E, state.peak),
        total=op.where(split < 1, state.total + 1, state.total),
    )


class _View(NamedTuple):
    """One key head of a row's pages."""

    about: Attention
    pool_at: Block
    table_at: Block
    first_page: Block
    kv_head: Block
    last: Block

    def load(self, key: Block, visible: Block) -> tuple[Block, Block]:
        """Keys and values (keys, lanes) at positions (keys,); zeros where not visible, whatever lies there."""
        _, _, kv_heads, page_tokens, head_dim = self.about.pool.shape
        page = op.load(self.table_at + key // page_tokens, visible) + self.first_page
        # A pool may have more than 2**31 elements.
        row = (page.to("int64") * (2 * kv_heads) + self.kv_head.to("int64")) * page_tokens
        lane = op.arange(self.about.lanes)[None, :]
        at = self.pool_at + ((row + (key % page_tokens).to("int64")) * head_dim)[:, None] + lane
        inside = visible[:, None] & (lane < head_dim)
        values_at = at + kv_heads * page_tokens * head_dim
        return op.load(at, inside).to(self.about.dtype), op.load(values_at, inside).to(self.about.dtype)


def _first_key(about: Attention, position: Block, is_real: Block, last: Block) -> Block:
    """The first position that some query of the tile sees."""
    if not about.window:
        return op.constant(0)
    return op.maximum(op.where(is_real, position, last).min(0) - (about.window - 1), 0)


def _share(start: Block, stop: Block, split: Block, splits: int) -> tuple[Block, Block]:
    """The part of start, ..., stop - 1 that belongs to a split."""
    if splits == 1:
        return start, stop
    each = (stop - start + (splits - 1)) // splits
    own = start + split * each
    return own, op.minimum(own + each, stop)


def _visit(
    about: Attention, view: _View, q: Block, position: Block, first_key: Block, i: Block, state: _State
) -> _State:
    """The state after the i-th keys."""
    key = i * about.keys + op.arange(about.keys)
    visible = key <= view.last
    if about.window:  # the pages in front of it may be another row's by now
        visible = visible & (key >= first_key)
    k, v = view.load(key, visible)
    scores = op.dot(q, op.transpose(k), op.full((about.queries, about.keys), 0, "float32"))
    if about.softcap:
        scores = op.tanh(scores * (about.scale / about.softcap)) * (about.softcap * _LOG2_E)
    else:
        scores = scores * (about.scale * _LOG2_E)
    seen = key[None, :] <= position[:, None]
    if about.window:
        seen = seen & (key[None, :] > position[:, None] - about.window)
    scores = op.where(seen, scores, -math.inf)
    peak = op.maximum(state.peak, scores.max(1))
    weights, shrink = op.exp2(scores - peak[:, None]), op.exp2(state.peak - peak)
    total = state.total * shrink + weights.sum(1)
    return _State(peak, total, op.dot(weights.to(about.dtype), v, state.acc * shrink[:, None]))


@functools.cache
def combine_kernel(about: Attention) -> Kernel:
    """Puts the parts of all splits together. Operands: as `paged_attention_kernel` gives them; result (T, N H)."""
    tokens, heads, head_dim = about.q.shape

    def body(acc_at: Block, peak_at: Block, total_at: Block, out_at: Block) -> None:
        head = op.program_id(1) * _HEADS_PER_COMBINE + op.arange(_HEADS_PER_COMBINE)
        lane = op.arange(about.lanes)[None, :]
        known, inside = head < heads, (head < heads)[:, None] & (lane < head_dim)
        places = [(op.program_id(0) + split * tokens) * heads + head for split in range(about.splits)]
        peaks = [op.load(peak_at + at, known) for at in places]
        peak = functools.reduce(op.maximum, peaks)
        shares = [op.exp2(part - peak) for part in peaks]
        totals = [share * op.load(total_at + at, known) for share, at in zip(shares, places, strict=True)]
        sums = [op.load(acc_at + (at * head_dim)[:, None] + lane, inside) for at in places]
        acc = functools.reduce(operator.add, (share[:, None] * part for share, part in zip(shares, sums, strict=True)))
        total = functools.reduce(operator.add, totals)
        result = acc / op.maximum(total, 1e-30)[:, None]
        op.store(out_at + (places[0] * head_dim)[:, None] + lane, result.to(about.q.dtype), inside)  # type: ignore

    result = TensorType(about.q.dtype, (tokens, heads * head_dim))
    grid = (tokens, -(-heads // _HEADS_PER_COMBINE), 1)
    return build("combine_attention", _parts(about), [result], body, grid=grid)


def _parts(about: Attention) -> tuple[TensorType, ...]:
    tokens, heads, head_dim = about.q.shape
    each = TensorType("float32", (about.splits, tokens, heads))
    return TensorType("float32", (about.splits, tokens, heads, head_dim)), each, each
