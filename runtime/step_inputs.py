"""The arrays that a step graph takes, from the chunks that the scheduler chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..compiler.limits import Limits
from .scheduler import Chunk


@dataclass(frozen=True)
class StepInputs:
    """The graph to call, its inputs in order, and the chunks that get a row of logits each, in order of the rows."""

    graph: str
    arrays: list[np.ndarray]
    sampled: list[Chunk]


def make_inputs(chunks: Sequence[Chunk], limits: Limits) -> StepInputs:
    """Lays the chunks out token after token, and pads them to the smallest buckets that hold them."""
    sampled = [chunk for chunk in chunks if chunk.samples]
    count = sum(chunk.count for chunk in chunks)
    tokens = next(bucket for bucket in limits.token_buckets if bucket >= max(count, len(sampled)))
    rows = next(rows for rows in limits.logit_rows(tokens) if rows >= len(sampled))

    ids = np.zeros(tokens, np.int32)
    positions = np.zeros(tokens, np.int32)
    row_of = np.full(tokens, -1, np.int32)
    slots = np.zeros(tokens, np.int32)
    page_table = np.zeros((limits.max_batch, limits.max_pages), np.int32)
    lengths = np.zeros(limits.max_batch, np.int32)
    logit_rows = np.zeros(rows, np.int32)

    at = num_logits = 0
    for chunk in chunks:
        sequence, end = chunk.sequence, at + chunk.count
        position = np.arange(chunk.start, chunk.start + chunk.count, dtype=np.int32)
        pages = np.asarray(sequence.pages, np.int32)
        ids[at:end] = sequence.tokens[chunk.start : chunk.start + chunk.count]
        positions[at:end] = position
        row_of[at:end] = sequence.row
        slots[at:end] = pages[position // limits.page_tokens] * limits.page_tokens + position % limits.page_tokens
        page_table[sequence.row, : len(pages)] = pages
        lengths[sequence.row] = chunk.start + chunk.count
        if chunk.samples:
            logit_rows[num_logits] = end - 1
            num_logits += 1
        at = end

    on_host = np.full(tokens, -1, np.int32)  # every token is known here; none is taken from the last sampler's output
    previous = np.zeros(limits.max_batch, np.int32)
    arrays = [ids, on_host, previous, positions, row_of, slots, page_table, lengths, logit_rows]
    return StepInputs(f"step_t{tokens}_r{rows}", arrays, sampled)
