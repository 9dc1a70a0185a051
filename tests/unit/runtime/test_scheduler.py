"""The scheduler alone: chunks fit, rows and pages have one owner, and every request is done in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from max.compiler.limits import Limits
from max.runtime.policy import Policy
from max.runtime.request import Generation, Request
from max.runtime.scheduler import Chunk, Scheduler


def limits(**changes) -> Limits:
    sizes = {"max_length": 16, "max_batch": 3, "page_tokens": 4, "num_pages": 13, "token_buckets": (1, 2, 4, 8)}
    return Limits(**{**sizes, **changes})


def request(name: str, prompt: int, new: int = 4) -> Request:
    return Request(name, list(range(prompt)), max_new_tokens=new)


def layout(chunks: list[Chunk]) -> list[tuple[str, int, int, bool]]:
    return [(chunk.sequence.request.id, chunk.start, chunk.count, chunk.samples) for chunk in chunks]


def advance(scheduler: Scheduler, chunks: list[Chunk]) -> list[Generation]:
    """What the engine does after a step, with token 7 for every sample; returns what has finished."""
    finished = []
    for chunk in chunks:
        sequence = chunk.sequence
        samples = chunk.samples
        sequence.computed += chunk.count
        if samples:
            sequence.tokens.append(7)
        scheduler.keep_prefix(sequence)
        if samples and sequence.finish_reason(scheduler.limits.max_length):
            scheduler.finish(sequence)
            finished.append(sequence)
    return finished


def test_decodes_come_before_prompts_and_prompts_are_cut_to_the_budget():
    """Beside one that decodes, a step has 4 tokens: the first bucket that holds a quarter of 8, and 4 for each."""
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 10))
    scheduler.add(request("c", 2))
    steps = []
    for _ in range(5):
        chunks = scheduler.schedule()
        steps.append(layout(chunks))
        advance(scheduler, chunks)
    assert steps == [
        [("a", 0, 3, True), ("b", 0, 5, False)],
        [("a", 3, 1, True), ("b", 5, 3, False)],
        [("a", 4, 1, True), ("b", 8, 2, True), ("c", 0, 1, False)],
        [("a", 5, 1, True), ("b", 10, 1, True), ("c", 1, 1, True)],
        [("b", 11, 1, True), ("c", 2, 1, True)],
    ]


def test_prompts_share_a_step_and_the_oldest_has_the_most_of_it():
    scheduler = Scheduler(limits(max_length=400, max_batch=4, page_tokens=100, num_pages=20, token_buckets=(64, 128)))
    for name, prompt in (("long", 300), ("longer", 350), ("short", 20), ("more", 30)):
        scheduler.add(request(name, prompt))
    assert layout(scheduler.schedule()) == [
        ("long", 0, 64, False), ("longer", 0, 32, False), ("short", 0, 16, False), ("more", 0, 16, False),
    ]  # fmt: skip


def test_what_younger_prompts_leave_goes_to_the_oldest():
    scheduler = Scheduler(limits(max_length=400, page_tokens=100, num_pages=20, token_buckets=(64, 128)))
    scheduler.add(request("long", 300))
    scheduler.add(request("short", 5))
    assert layout(scheduler.schedule()) == [("long", 0, 123, False), ("short", 0, 5, True)]


def test_a_step_little_larger_than_a_bucket_is_cut_to_it():
    """Padding takes as long as tokens: 64 and then 32 take less time than 128."""
    scheduler = Scheduler(limits(max_length=400, page_tokens=100, num_pages=20, token_buckets=(1, 32, 64, 128)))
    scheduler.add(request("a", 80))
    chunks = scheduler.schedule()
    assert layout(chunks) == [("a", 0, 64, False)]
    advance(scheduler, chunks)
    assert layout(scheduler.schedule()) == [("a", 64, 16, True)]
    scheduler.add(request("b", 100))
    scheduler.finish(scheduler.running[0])
    assert layout(scheduler.schedule()) == [("b", 0, 100, True)], "two steps would take longer"


def test_without_chunks_a_prompt_waits_for_a_step_that_holds_all_of_it():
    scheduler = Scheduler(limits(), Policy(chunked_prefill=False))
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 8))
    steps = []
    for _ in range(4):
        chunks = scheduler.schedule()
        steps.append(layout(chunks))
        advance(scheduler, chunks)
    assert steps == [
        [("a", 0, 3, True)],
        [("a", 3, 1, True)],
        [("b", 0, 8, True)],
        [("a", 4, 1, True), ("b", 8, 1, True)],
    ]


def test_without_in_flight_batching_prompts_and_decoding_take_turns():
    scheduler = Scheduler(limits(), Policy(in_flight_batching=False))
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 10))
    steps = []
    for _ in range(5):
        chunks = scheduler.schedule()
        steps.append(layout(chunks))
        advance(scheduler, chunks)
    assert steps == [
        [("a", 0, 3, True), ("b", 0, 5, False)],
        [("a", 3, 1, True)],
        [("b", 5, 5, True)],
        [("a", 4, 1, True), ("b", 10, 1, True)],
        [("a", 5, 1, True), ("b", 11, 1, True)],
    ]


def test_the_second_token_comes_before_all_else_where_that_is_asked_for():
    scheduler = Scheduler(limits(), Policy(first_decode_alone=True))
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 10))
    scheduler.add(request("c", 2))
    steps = []
    for _ in range(7):
        chunks = scheduler.schedule()
        steps.append(layout(chunks))
        advance(scheduler, chunks)
    assert steps == [
        [("a", 0, 3, True), ("b", 0, 5, False)],
        [("a", 3, 1, True)],
        [("a", 4, 1, True), ("b", 5, 3, False)],
        [("a", 5, 1, True), ("b", 8, 2, True), ("c", 0, 1, False)],
        [("b", 10, 1, True)],
        [("b", 11, 1, True), ("c", 1, 1, True)],
        [("c", 2, 1, True)],
    ]


def test_an_answer_that_ends_with_its_first_token_holds_up_nothing():
    scheduler = Scheduler(limits(), Policy(first_decode_alone=True))
    scheduler.add(request("a", 3, new=1))
    scheduler.add(request("b", 6))
    chunks = scheduler.schedule()
    assert layout(chunks) == [("a", 0, 3, True), ("b", 0, 5, False)]
    advance(scheduler, chunks)
    assert layout(scheduler.schedule()) == [("b", 5, 1, True)]


def test_a_prompt_is_not_cut_into_less_than_the_least_chunk():
    large = limits(max_length=400, page_tokens=100, num_pages=20, token_buckets=(64, 128))
    scheduler = Scheduler(large, Policy(least_chunk=40))
    scheduler.add(request("a", 140))
    scheduler.add(request("b", 70))
    chunks = scheduler.schedule()
    assert layout(chunks) == [("a", 0, 100, False)], "28 are left of the step, and b cannot be cut"
    advance(scheduler, chunks)
    assert layout(scheduler.schedule()) == [("a", 100, 40, True), ("b", 0, 70, True)]


def test_a_long_prompt_has_no_more_of_a_step_than_the_most():
    large = limits(max_length=400, page_tokens=100, num_pages=20, token_buckets=(64, 128))
    scheduler = Scheduler(large, Policy(most_chunk=50))
    scheduler.add(request("a", 300))
    scheduler.add(request("b", 60))
    assert layout(scheduler.schedule()) == [("a", 0, 50, False), ("b", 0, 50, False)]


def test_no_more_run_than_may():
    scheduler = Scheduler(limits(), Policy(max_running=1))
    scheduler.add(request("a", 2))
    scheduler.add(request("b", 2))
    chunks = scheduler.schedule()
    assert layout(chunks) == [("a", 0, 2, True)]
    advance(scheduler, chunks)
    scheduler.finish(scheduler.running[0])
    assert layout(scheduler.schedule()) == [("b", 0, 2, True)]


def test_new_requests_leave_pages_above_the_watermark_to_those_that_run():
    scheduler = Scheduler(limits(), Policy(pages_watermark=0.5))  # 6 of 12 pages
    scheduler.add(request("a", 16, new=0))
    scheduler.add(request("b", 8))
    scheduler.add(request("c", 4))
    advance(scheduler, scheduler.schedule())
    assert [each.request.id for each in scheduler.running] == ["a"], "4 pages are in use, and b wants 2"
    scheduler.finish(scheduler.running[0])
    scheduler.schedule()
    assert [each.request.id for each in scheduler.running] == ["b", "c"]


def test_a_beginning_that_was_computed_before_is_not_computed_again():
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 9, new=1))
    advance(scheduler, scheduler.schedule())
    advance(scheduler, scheduler.schedule())
    first = scheduler.add(request("same", 9))
    other = scheduler.add(Request("salted", list(range(9)), cache_salt="of another user"))
    assert layout(scheduler.schedule()) == [("same", 8, 1, True), ("salted", 0, 7, False)]
    assert (first.cached_tokens, other.cached_tokens) == (8, 0)
    assert (scheduler.hit_tokens, scheduler.miss_tokens) == (8, 9 + 1 + 9)


def test_what_a_sequence_has_computed_is_found_again_after_it_gave_way():
    scheduler = Scheduler(limits(num_pages=6))
    old, young = scheduler.add(request("old", 3, new=9)), scheduler.add(request("young", 7, new=3))
    advance(scheduler, scheduler.schedule())
    advance(scheduler, scheduler.schedule())
    assert len(young.tokens) == 8
    scheduler.preempt(young)
    chunks = scheduler.schedule()
    assert layout(chunks) == [("old", old.computed, 1, True), ("young", 4, 3, False)]


def test_rows_bound_the_batch():
    scheduler = Scheduler(limits(max_batch=2))
    for name in "abc":
        scheduler.add(request(name, 1, new=1))
    chunks = scheduler.schedule()
    assert [chunk.sequence.row for chunk in chunks] == [0, 1]
    assert [done.request.id for done in advance(scheduler, chunks)] == ["a", "b"]
    assert layout(scheduler.schedule()) == [("c", 0, 1, True)]


def test_the_youngest_gives_way_and_keeps_what_it_has_made():
    scheduler = Scheduler(limits(num_pages=5))
    old, young = scheduler.add(request("old", 7, new=9)), scheduler.add(request("young", 3, new=9))
    for _ in range(3):
        advance(scheduler, scheduler.schedule())
    assert (old.computed, len(old.pages)) == (9, 3)
    assert (young.computed, len(young.pages)) == (4, 1)
    made = list(young.tokens)
    chunks = scheduler.schedule()  # young needs its second page
    assert layout(chunks) == [("old", 9, 1, True)]
    assert (young.row, young.pages, young.computed, young.tokens, scheduler.preempted) == (-1, [], 0, made, 1)
    while young in scheduler.waiting:
        advance(scheduler, chunks)
        chunks = scheduler.schedule()
    assert layout(chunks) == [("young", 0, len(made), True)]


def test_a_preempted_prompt_does_not_come_back_before_all_of_it_fits():
    """Otherwise its first chunk would be computed in every step, and thrown away in the next."""
    scheduler = Scheduler(limits(max_length=24, num_pages=7, token_buckets=(1, 4)))
    old, young = scheduler.add(request("old", 15, new=9)), scheduler.add(Request("young", [9] * 8, max_new_tokens=4))
    chunks = scheduler.schedule()
    while not scheduler.preempted:
        advance(scheduler, chunks)
        chunks = scheduler.schedule()
    while old in scheduler.running:
        assert young in scheduler.waiting
        assert [chunk.sequence for chunk in chunks] == [old]
        advance(scheduler, chunks)
        chunks = scheduler.schedule()
    assert [chunk.sequence for chunk in chunks] == [young]
    assert len(young.pages) * 4 >= len(young.tokens) >= 8


def test_a_preempted_request_goes_before_those_that_came_later():
    scheduler = Scheduler(limits())
    first = scheduler.add(request("first", 2))
    scheduler.add(request("second", 2))
    advance(scheduler, scheduler.schedule())
    scheduler.add(request("third", 2))
    scheduler.preempt(scheduler.running[-1])
    scheduler.preempt(first)
    assert [sequence.request.id for sequence in scheduler.waiting] == ["first", "second", "third"]


def test_finishing_a_waiting_request_takes_it_from_the_queue():
    scheduler = Scheduler(limits())
    sequence = scheduler.add(request("a", 2))
    scheduler.finish(sequence)
    assert scheduler.is_idle
    assert scheduler.schedule() == []


def test_a_pool_too_small_for_one_row_is_a_defect():
    with pytest.raises(AssertionError, match="full length"):
        Scheduler(limits(num_pages=4))


requests = st.lists(st.tuples(st.integers(1, 15), st.integers(1, 16), st.integers(0, 12)), min_size=1, max_size=12)


@given(
    requests=requests,
    spare_pages=st.integers(0, 8),
    page_tokens=st.sampled_from([1, 3, 4]),
    max_batch=st.integers(1, 4),
    budget=st.sampled_from([4, 8, 16]),
    aborts=st.dictionaries(st.integers(0, 11), st.integers(0, 30), max_size=4),
)
def test_every_request_ends_and_nothing_is_owned_twice(requests, spare_pages, page_tokens, max_batch, budget, aborts):
    """requests: prompt tokens, new tokens, step of arrival; aborts: request -> step."""
    sizes = limits(
        page_tokens=page_tokens, num_pages=1 + -(-16 // page_tokens) + spare_pages, max_batch=max_batch,
        token_buckets=(1, 4, budget),
    )  # fmt: skip
    scheduler = Scheduler(sizes)
    live: dict[int, Generation] = {}
    ended = 0
    for step in range(1200):
        for index, (prompt, new, arrival) in enumerate(requests):
            if arrival == step:
                live[index] = scheduler.add(request(str(index), prompt, new))
        for index, when in aborts.items():
            if when == step and index in live:
                scheduler.finish(live.pop(index))
                ended += 1
        chunks = scheduler.schedule()
        check_step(scheduler, chunks)
        assert chunks or not live, "requests wait, and nothing is done"
        for done in advance(scheduler, chunks):
            prompt, new, _ = requests[int(done.request.id)]
            assert len(done.output) == min(new, 16 - prompt)
            del live[int(done.request.id)]
            ended += 1
        if ended == len(requests):
            break
    assert ended == len(requests)
    assert scheduler.is_idle
    assert scheduler.pages.free == sizes.num_pages - 1


def check_step(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    sizes = scheduler.limits
    assert sum(chunk.count for chunk in chunks) <= sizes.token_buckets[-1]
    assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        assert chunk.count > 0
        assert chunk.start == chunk.sequence.computed
        assert chunk.sequence in scheduler.running
        assert len(chunk.sequence.pages) * sizes.page_tokens >= chunk.start + chunk.count
    rows = [sequence.row for sequence in scheduler.running]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(sizes.max_batch))
    check_pages(scheduler)
    for sequence in scheduler.waiting:
        assert (sequence.row, sequence.pages, sequence.computed) == (-1, [], 0)


def check_pages(scheduler: Scheduler) -> None:
    """Pages are in use or free; what two use is a full page at the same place in both, behind the same tokens."""
    sizes = scheduler.limits
    owners: dict[int, tuple[Generation, int]] = {}
    for sequence in scheduler.running:
        assert len(set(sequence.pages)) == len(sequence.pages)
        for place, page in enumerate(sequence.pages):
            other, other_place = owners.setdefault(page, (sequence, place))
            if other is not sequence:
                end = (place + 1) * sizes.page_tokens
                assert place == other_place
                assert sequence.request.cache_salt == other.request.cache_salt
                assert sequence.tokens[:end] == other.tokens[:end]
                assert min(sequence.computed, other.computed) >= end, "one of them would still write to it"
    assert 0 not in owners
    assert len(owners) + scheduler.pages.free == sizes.num_pages - 1
