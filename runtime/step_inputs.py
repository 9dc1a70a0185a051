"""The arrays that a step graph takes, from the chunks that the scheduler chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..compiler.limits import Limits
from .model import Buffer
from .request import Generation
from .scheduler import Chunk


@dataclass(frozen=True)
class StepInputs:
    """The graph to call, its inputs in order, and the chunks that get a row of logits each, in order of the rows.

    Inputs are numpy arrays, but for ids that are still on the device.
    """

    graph: str
    arrays: list[Any]
    sampled: list[Chunk]


def make_inputs(
    chunks: Sequence[Chunk],
    limits: Limits,
    places: Mapping[Generation, int] | None = None,
    previous: Buffer | None = None,
) -> StepInputs:
    """Lays the chunks out token after token, and pads them to the smallest buckets that hold them.

    previous: (max_batch,) ids of the step before that are still on the device
    places:   where the last token of a sequence that has one in flight stands among them
    """
    sampled = [chunk for chunk in chunks if chunk.samples]
    count = sum(chunk.count for chunk in chunks)
    tokens = next(bucket for bucket in limits.token_buckets if bucket >= max(count, len(sampled)))
    rows = next(rows for rows in limits.logit_rows(tokens) if rows >= len(sampled))

    ids = np.zeros(tokens, np.int32)
    sources = np.full(tokens, -1, np.int32)
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
        known = sequence.tokens[chunk.start : chunk.start + chunk.count]
        ids[at : at + len(known)] = known
        if len(known) < chunk.count:
            assert places is not None, "a token is in flight, and nobody says where"
            sources[end - 1] = places[sequence]
        positions[at:end] = position
        row_of[at:end] = sequence.row
        slots[at:end] = pages[position // limits.page_tokens] * limits.page_tokens + position % limits.page_tokens
        page_table[sequence.row, : len(pages)] = pages
        lengths[sequence.row] = chunk.start + chunk.count
        if chunk.samples:
            logit_rows[num_logits] = end - 1
            num_logits += 1
        at = end

    previous_ids = np.zeros(limits.max_batch, np.int32) if previous is None else previous
    arrays = [ids, sources, previous_ids, positions, row_of, slots, page_table, lengths, logit_rows]
    return StepInputs(f"step_t{tokens}_r{rows}", arrays, sampled)
