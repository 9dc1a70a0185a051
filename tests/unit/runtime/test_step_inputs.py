"""The arrays of a step, written out for a mixed batch and checked in general."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from max.compiler.limits import Limits
from max.runtime.model import share
from max.runtime.request import Generation, Request
from max.runtime.scheduler import Chunk
from max.runtime.step_inputs import StepInputs, StepWriter

LIMITS = Limits(max_length=16, max_batch=3, page_tokens=4, num_pages=13, token_buckets=(1, 2, 4, 8))
NAMES = ("tokens", "token_src", "prev_ids", "positions", "rows", "slots", "page_table", "lengths", "logit_rows")


def sequence(row: int, tokens: list[int], pages: list[int]) -> Generation:
    return Generation(Request(str(row), tokens), tokens, row, pages)


def named(inputs: StepInputs) -> dict[str, np.ndarray]:
    return {name: array.to_numpy() for name, array in zip(NAMES, inputs.arrays, strict=True)}


def test_a_decode_between_two_prompts():
    decode = Chunk(sequence(2, [10, 11, 12, 13, 14, 15], [3, 9]), 5, 1, True)
    part = Chunk(sequence(0, [20, 21, 22, 23, 24, 25], [5, 1]), 3, 2, False)
    whole = Chunk(sequence(1, [30, 31], [4]), 0, 2, True)
    inputs = StepWriter(LIMITS).write([decode, part, whole])
    assert inputs.graph == "step_t8_r3"
    assert inputs.sampled == [decode, whole]
    arrays = named(inputs)
    assert {array.dtype for array in inputs.arrays} == {"int32"}
    assert arrays["tokens"].tolist() == [15, 23, 24, 30, 31, 0, 0, 0]
    assert arrays["token_src"].tolist() == [-1] * 8
    assert arrays["positions"].tolist() == [5, 3, 4, 0, 1, 0, 0, 0]
    assert arrays["rows"].tolist() == [2, 0, 0, 1, 1, -1, -1, -1]
    # page * 4 + offset; padding goes to page 0
    assert arrays["slots"].tolist() == [9 * 4 + 1, 5 * 4 + 3, 1 * 4 + 0, 16, 17, 0, 0, 0]
    assert arrays["page_table"].tolist() == [[5, 1, 0, 0], [4, 0, 0, 0], [3, 9, 0, 0]]
    assert arrays["lengths"].tolist() == [5, 2, 6]
    assert arrays["logit_rows"].tolist() == [0, 4, 0]


def test_a_step_that_samples_nothing_still_has_a_graph():
    inputs = StepWriter(LIMITS).write([Chunk(sequence(0, list(range(9)), [1, 2]), 0, 8, False)])
    assert (inputs.graph, inputs.sampled) == ("step_t8_r1", [])


def test_a_token_in_flight_is_taken_from_the_ids_of_the_step_before():
    known = Chunk(sequence(0, [7, 8], [1]), 1, 1, True)
    waited_for = sequence(1, [5], [2])
    waited_for.in_flight = 1
    previous = share(np.array([4, 5, 6], np.int32))
    inputs = StepWriter(LIMITS).write([known, Chunk(waited_for, 1, 1, True)], {waited_for: 2}, previous)
    arrays = named(inputs)
    assert arrays["prev_ids"].tolist() == [4, 5, 6]
    assert arrays["tokens"].tolist() == [8, 0]
    assert arrays["token_src"].tolist() == [-1, 2]
    assert arrays["slots"].tolist() == [4 + 1, 8 + 1]


def test_small_steps_give_as_many_rows_as_tokens():
    chunk = Chunk(sequence(0, [5], [1]), 0, 1, True)
    writer = StepWriter(LIMITS)
    assert writer.write([chunk]).graph == "step_t1_r1"
    both = [chunk, Chunk(sequence(1, [5], [2]), 0, 1, True)]
    assert writer.write(both).graph == "step_t2_r2"


@given(
    lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=3).filter(
        lambda rows: sum(count for _, count in rows) <= 8
    )
)
def test_every_graph_named_is_one_that_is_built_and_every_slot_is_the_rows_own(lengths):
    chunks = []
    for row, (start, count) in enumerate(lengths):
        held = [row * 4 + 1 + i for i in range(4)]
        chunks.append(Chunk(sequence(row, list(range(100, 100 + start + count)), held), start, count, True))
    writer = StepWriter(LIMITS)
    writer.write([Chunk(sequence(2, list(range(9, 17)), [12, 11]), 0, 8, True)])  # which must leave nothing behind
    inputs = writer.write(chunks)
    built = {f"step_t{tokens}_r{rows}" for tokens in LIMITS.token_buckets for rows in LIMITS.logit_rows(tokens)}
    assert inputs.graph in built
    arrays = named(inputs)
    used = sum(count for _, count in lengths)
    for token in range(used):
        row, position = arrays["rows"][token], arrays["positions"][token]
        assert arrays["tokens"][token] == 100 + position
        assert arrays["slots"][token] == arrays["page_table"][row, position // 4] * 4 + position % 4
    assert (arrays["rows"][used:] == -1).all()
    assert (arrays["slots"][used:] < 4).all()
    assert not arrays["slots"][used:].any()
    table = np.zeros((3, 4), np.int32)
    for chunk in chunks:
        table[chunk.sequence.row] = chunk.sequence.pages
    np.testing.assert_array_equal(arrays["page_table"], table)


def test_steps_of_one_size_are_written_to_the_same_memory():
    """A graph reads it there, whatever was written last; what a device takes is a copy."""
    writer = StepWriter(LIMITS)
    first, second = (writer.write([Chunk(sequence(0, [token], [1]), 0, 1, True)]) for token in (5, 6))
    assert [np.shares_memory(a.to_numpy(), b.to_numpy()) for a, b in zip(first.arrays, second.arrays, strict=True)] == [
        True
    ] * 9
    assert named(first)["tokens"].tolist() == [6]
