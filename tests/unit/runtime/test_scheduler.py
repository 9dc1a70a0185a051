"""The scheduler alone: chunks fit, rows and pages have one owner, and every request is done in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from max.compiler.limits import Limits
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
            if sequence.finish_reason(scheduler.limits.max_length):
                scheduler.finish(sequence)
                finished.append(sequence)
    return finished


def test_decodes_come_before_new_prompts_and_prompts_are_cut_to_the_budget():
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 10))
    scheduler.add(request("c", 2))
    chunks = scheduler.schedule()
    assert layout(chunks) == [("a", 0, 3, True), ("b", 0, 5, False)]
    advance(scheduler, chunks)
    chunks = scheduler.schedule()
    assert layout(chunks) == [("a", 3, 1, True), ("b", 5, 5, True), ("c", 0, 2, True)]
    advance(scheduler, chunks)
    assert layout(scheduler.schedule()) == [("a", 4, 1, True), ("b", 10, 1, True), ("c", 2, 1, True)]


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
    old, young = scheduler.add(request("old", 15, new=9)), scheduler.add(request("young", 8))
    while not scheduler.preempted:
        chunks = scheduler.schedule()
        advance(scheduler, chunks)
    assert (old.computed, scheduler.pages.free) == (17, 1)
    while old in scheduler.running:
        chunks = scheduler.schedule()
        assert [chunk.sequence for chunk in chunks] == [old]
        advance(scheduler, chunks)
    assert layout(scheduler.schedule()) == [("young", 0, 4, False)]
    assert young.pages == [1]


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
    owned = [page for sequence in scheduler.running for page in sequence.pages]
    assert len(set(owned)) == len(owned)
    assert 0 not in owned
    assert len(owned) + scheduler.pages.free == sizes.num_pages - 1
    for sequence in scheduler.waiting:
        assert (sequence.row, sequence.pages, sequence.computed) == (-1, [], 0)
