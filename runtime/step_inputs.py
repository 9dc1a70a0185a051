"""The arrays that a step graph takes, from the chunks that the scheduler chose.

They are made once and written anew for every step: on a CPU the graphs read them where they are, on a device they are
copied there.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from ..compiler import xla
from ..compiler.limits import Limits
from .arena import lazy_zeros
from .model import Buffer, share
from .request import Generation
from .scheduler import Chunk

_ALIGNMENT = 64 // 4  # int32 of a cache line, at which jaxlib shares an array's memory


@dataclass(frozen=True)
class StepInputs:
    """The graph to call, its inputs in order, and the chunks that get a row of logits each, in order of the rows.

    On a CPU the inputs are overwritten by the next step's: a call has read them when it returns there.

    scored: behind those, each row of a prompt whose next token is known: chunk and position
    """

    graph: str
    arrays: list[Buffer]
    sampled: list[Chunk]
    scored: list[tuple[Chunk, int]]


class StepWriter:
    """Lays steps out as arrays; `limits` are the engine's."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._common = _Arrays({"page_table": (limits.max_batch, limits.max_pages), "lengths": (limits.max_batch,)})
        self._no_ids = share(lazy_zeros((limits.max_batch,), np.int32))
        self._by_size: dict[tuple[int, int], _Arrays] = {}

    def write(
        self, chunks: Sequence[Chunk], places: Mapping[Generation, int] | None = None, previous: Buffer | None = None
    ) -> StepInputs:
        """Lays the chunks out token after token, and pads them to the smallest buckets that hold them.

        previous: (max_batch,) ids of the step before that are still on the device
        places:   where the last token of a sequence that has one in flight stands among them
        """
        sampled = [chunk for chunk in chunks if chunk.samples]
        scored = [(chunk, position) for chunk in chunks for position in _scored(chunk)]
        wanted = max(sum(chunk.count for chunk in chunks), len(sampled))
        buckets, num_rows = self._limits.token_buckets, len(sampled) + len(scored)
        tokens = buckets[bisect_left(buckets, wanted)]
        rows = next(rows for rows in self._limits.logit_rows(tokens) if rows >= num_rows)
        step = self._by_size.get((tokens, rows))
        if step is None:
            by_token = ("tokens", "token_src", "positions", "rows", "slots")
            step = _Arrays({**dict.fromkeys(by_token, (tokens,)), "logit_rows": (rows,)})
            self._by_size[tokens, rows] = step
        self._write_tokens(step, chunks, places)
        self._write_rows(chunks)
        given = {**step.buffers(), **self._common.buffers(), "prev_ids": previous or self._no_ids}
        return StepInputs(f"step_t{tokens}_r{rows}", list(_IN_ORDER(given)), sampled, scored)

    def _write_tokens(self, step: _Arrays, chunks: Sequence[Chunk], places: Mapping[Generation, int] | None) -> None:
        # Lists of Python's numbers: most steps have a token or a few of each sequence, for which numpy takes longer.
        size = self._limits.page_tokens
        ids: list[int] = []
        sources: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        scored_rows: list[int] = []
        for chunk in chunks:
            sequence, count, end = chunk.sequence, chunk.count, chunk.start + chunk.count
            pages, known = sequence.pages, sequence.tokens[chunk.start : end]
            scored_rows += [len(ids) + position - chunk.start for position in _scored(chunk)]
            ids += known
            sources += [-1] * len(known)
            if len(known) < count:
                assert places is not None, "a token is in flight, and nobody says where"
                ids.append(0)
                sources.append(places[sequence])
            positions += range(chunk.start, end)
            rows += [sequence.row] * count
            slots += [pages[at // size] * size + at % size for at in range(chunk.start, end)]
            if chunk.samples:
                logit_rows.append(len(ids) - 1)
        step.write("tokens", ids)
        step.write("token_src", sources, -1)
        step.write("positions", positions)
        step.write("rows", rows, -1)
        step.write("slots", slots)
        step.write("logit_rows", logit_rows + scored_rows)

    def _write_rows(self, chunks: Sequence[Chunk]) -> None:
        table, lengths = self._common.arrays["page_table"], self._common.arrays["lengths"]
        table.fill(0)
        lengths.fill(0)
        for chunk in chunks:
            row, pages = chunk.sequence.row, chunk.sequence.pages
            table[row, : len(pages)] = pages
            lengths[row] = chunk.start + chunk.count


def _scored(chunk: Chunk) -> Sequence[int]:
    """The positions of a chunk whose logits are wanted, as `Generation.scored` has them."""
    return chunk.sequence.scored(chunk.start, chunk.count) if chunk.sequence.request.prompt_logprobs else ()


_ORDER = ("tokens", "token_src", "prev_ids", "positions", "rows", "slots", "page_table", "lengths", "logit_rows")
"""The inputs of a step, as models/text_graphs.py has them."""
_IN_ORDER = itemgetter(*_ORDER)


class _Arrays:
    """int32 arrays by name, and buffers of what is in them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        room = {name: -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for name, shape in shapes.items()}
        memory, at = lazy_zeros((sum(room.values()),), np.int32), 0
        for name, shape in shapes.items():
            self.arrays[name] = memory[at : at + math.prod(shape)].reshape(shape)
            at += room[name]
        self._shared = {name: share(array) for name, array in self.arrays.items()} if xla.shares_memory() else None

    def write(self, name: str, values: list[int], rest: int = 0) -> None:
        """Writes the beginning of an array, and `rest` behind it."""
        array = self.arrays[name]
        array[: len(values)] = values
        if len(values) < len(array):
            array[len(values) :] = rest

    def buffers(self) -> dict[str, Buffer]:
        """The arrays as a call of a graph takes them."""
        if self._shared is not None:
            return self._shared
        return {name: share(array.copy()) for name, array in self.arrays.items()}
