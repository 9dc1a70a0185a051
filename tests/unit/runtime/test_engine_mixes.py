"""The engine under any mix of requests, aborts and policies: each answer is what its own tokens alone lead to.

The model's next token is a hash of all tokens that the row can read through its page table, in order. A wrong page, a
page written too late or too early, or a token taken from another row changes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from max import CapacityError, MaxError
from max.compiler import xla
from max.compiler.limits import Limits
from max.runtime.engine import Engine
from max.runtime.model import Buffer
from max.runtime.policy import Policy
from max.runtime.request import Request
from max.runtime.sampling import SamplingParams
from max.runtime.step_results import EngineLost, Failure, Token

VOCAB = 13
GREEDY = SamplingParams(temperature=0)
COUNTED = SamplingParams(temperature=0, repetition_penalty=1.5)


def following(tokens: list[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def answer_to(request: Request, max_length: int) -> list[int]:
    """What the request gets when it is alone and everything is right."""
    tokens = list(request.prompt)
    while len(tokens) < max_length and len(tokens) - len(request.prompt) < (request.max_new_tokens or max_length):
        tokens.append(following(tokens))
        if tokens[-1] in request.stop_tokens:
            break
    return tokens[len(request.prompt) :]


def buffer(array: np.ndarray) -> Buffer:
    return Buffer(xla.put(array), str(array.dtype), array.shape)


class HashModels(dict[str, Any]):
    """Steps that keep tokens in pages, and samplers that take the largest logit. `fault` spoils the next step."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.page_tokens = limits.page_tokens
        self.memory = np.full(limits.num_pages * limits.page_tokens, -999)
        self.max_batch = limits.max_batch
        self.fault = ""
        for tokens in limits.token_buckets:
            for rows in limits.logit_rows(tokens):
                self[f"step_t{tokens}_r{rows}"] = self.step
        for rows in limits.row_buckets:
            self[f"sample_greedy_r{rows}"] = self.sample
            self[f"sample_full_r{rows}"] = self.sample
            self[f"sample_logprobs_r{rows}"] = self.logprobs

    def step(self, *inputs: Buffer) -> list[Buffer]:
        arrays = (each.to_numpy() for each in inputs)
        tokens, sources, previous, positions, rows, slots, page_table, lengths, logit_rows = arrays
        if self.fault == "raises":
            raise ValueError("out of luck")
        taken = previous[np.maximum(sources, 0)]
        known = np.where(sources >= 0, taken, tokens)
        self.memory[slots[rows >= 0]] = known[rows >= 0]
        logits = np.zeros((len(logit_rows), VOCAB), np.float32)
        for i, token in enumerate(logit_rows):
            row, place = rows[token], np.arange(int(positions[token]) + 1)
            assert lengths[row] > positions[token]
            seen = self.memory[page_table[row, place // self.page_tokens] * self.page_tokens + place % self.page_tokens]
            logits[i, following(seen.tolist())] = 1
        if self.fault == "NaN":
            logits[0, 3] = np.nan
        return [buffer(logits)]

    def sample(self, logits: Buffer, *_: Any) -> list[Buffer]:
        ids = np.zeros(self.max_batch, np.int32)
        values = logits.to_numpy()
        ids[: len(values)] = np.where(np.isnan(values).any(axis=-1), -1, np.argmax(values, axis=-1))
        return [buffer(ids)]

    def logprobs(self, logits: Buffer, ids: Buffer) -> list[Buffer]:
        values = logits.to_numpy()
        top = np.argsort(-values, axis=-1, kind="stable")[:, :5].astype(np.int32)
        chosen = values[np.arange(len(values)), ids.to_numpy()[: len(values)]]
        return [buffer(chosen), buffer(top), buffer(np.take_along_axis(values, top, axis=-1))]


POLICIES = [
    Policy(),
    Policy(prefix_caching=False),
    Policy(chunked_prefill=False),
    Policy(in_flight_batching=False),
    Policy(max_running=1, pages_watermark=0.5, least_chunk=2, most_chunk=3, decode_floor=2),
    Policy(prompt_interval=3, coalesced=3, least_chunk=9),
    Policy(first_decode_alone=True),
    Policy(first_decode_alone=True, in_flight_batching=False, decode_floor=1),
    Policy(in_flight_batching=False, decode_floor=1, chunked_prefill=False, pages_watermark=0),
]
PROMPT = [1, 2, 3]


def make(limits: Limits, policy: Policy, overlap: bool, **settings: Any) -> tuple[Engine, HashModels]:
    models = HashModels(limits)
    return Engine(models, limits, VOCAB, policy=policy, overlap=overlap, **settings), models  # type: ignore[arg-type]


def small(**changes: Any) -> Limits:
    sizes = {"max_length": 16, "max_batch": 3, "page_tokens": 4, "num_pages": 9, "token_buckets": (1, 2, 4, 8)}
    return Limits(**{**sizes, **changes})


class Mix(RuleBasedStateMachine):
    """Requests come, are aborted and are worked on in any order."""

    @initialize(
        policy=st.sampled_from(POLICIES), overlap=st.booleans(), num_pages=st.integers(5, 12), rows=st.integers(1, 3)
    )
    def begin(self, policy, overlap, num_pages, rows):
        self.limits = small(num_pages=num_pages, max_batch=rows)
        self.engine, _ = make(self.limits, policy, overlap)
        self.requests: dict[str, Request] = {}
        self.got: dict[str, list[int]] = {}
        self.count = 0

    @rule(
        prompt=st.sampled_from([[1], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9], [5] * 7]),
        rest=st.lists(st.integers(0, 2), max_size=3),
        new=st.integers(1, 12),
        stop=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
        salt=st.sampled_from(["", "", "salt"]),
        sampling=st.sampled_from([GREEDY, GREEDY, COUNTED]),
    )
    def add(self, prompt, rest, new, stop, salt, sampling):
        tokens = [*prompt, *rest][: self.limits.token_buckets[-1]]
        name = str(self.count)
        self.count += 1
        request = Request(name, tokens, sampling, max_new_tokens=new, stop_tokens=stop, cache_salt=salt)
        self.requests[name], self.got[name] = request, []
        self.engine.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        assert self.engine.abort(name)
        del self.requests[name]

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            for token in self.engine.step():
                assert isinstance(token, Token)
                self.take(token)

    def take(self, token: Token) -> None:
        got, request = self.got[token.request_id], self.requests[token.request_id]
        got.append(token.id)
        wanted = answer_to(request, self.limits.max_length)
        assert got == wanted[: len(got)]
        assert (token.finish_reason is not None) == (got == wanted)
        if token.finish_reason is not None:
            del self.requests[token.request_id]

    @rule()
    def reset(self):
        self.engine.reset_prefix_cache()

    @invariant()
    def every_page_has_its_owners(self):
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        used = {page for sequence in scheduler.running for page in sequence.pages}
        assert len(used) + scheduler.pages.free == self.limits.num_pages - 1
        assert set(self.engine.request_ids) == set(self.requests)
        if not self.requests:
            assert scheduler.is_idle
            assert scheduler.pages.free == self.limits.num_pages - 1

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(400):
            if self.engine.is_idle:
                break
            self.step(1)
        assert self.engine.is_idle, "some requests are never done"
        assert not self.requests


Mix.TestCase.settings = settings(max_examples=settings().max_examples, stateful_step_count=25)
TestMix = Mix.TestCase


def collect(engine: Engine) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    while not engine.is_idle:
        for token in engine.step():
            assert isinstance(token, Token), token
            answers.setdefault(token.request_id, []).append(token.id)
    return answers


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
@given(
    requests=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8), st.integers(1, 15)), min_size=1, max_size=12),
    page_tokens=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 4),
)
@settings(max_examples=settings().max_examples // 6)
def test_requests_that_begin_alike_get_what_they_get_alone(policy, overlap, requests, page_tokens, rows):
    """requests: which of four beginnings, how much of it, new tokens."""
    limits = small(page_tokens=page_tokens, num_pages=1 + 2 * 16 // page_tokens, max_batch=rows)
    engine, _ = make(limits, policy, overlap)
    beginnings = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 0, 0, 0, 0], [9] * 8, [2, 3, 4, 5, 6, 7, 8, 9]]
    asked = [
        Request(str(i), beginnings[which][:length], GREEDY, max_new_tokens=new)
        for i, (which, length, new) in enumerate(requests)
    ]
    for request in asked:
        engine.add(request)
    assert collect(engine) == {request.id: answer_to(request, 16) for request in asked}
    assert engine.stats.ended == {"finished": len(asked)}


def test_a_repeated_prompt_takes_its_pages_from_the_first_answer():
    engine, _ = make(small(), Policy(), overlap=False)
    first = Request("a", [1, 2, 3, 4, 5], GREEDY, max_new_tokens=8)
    engine.add(first)
    answer = collect(engine)["a"]
    longer = [*first.prompt, *answer]
    engine.add(Request("b", longer, GREEDY, max_new_tokens=1))
    (token,) = engine.step()
    assert isinstance(token, Token)
    assert token.cached_tokens == 12
    assert token.id == following(longer)
    assert (engine.scheduler.hit_tokens, engine.scheduler.miss_tokens) == (12, 5 + 1)
    assert engine.scheduler.hit_pages == 3
    assert engine.reset_prefix_cache() == 3
    engine.add(Request("c", longer, GREEDY, max_new_tokens=1))
    assert [token.cached_tokens for token in engine.step() + engine.step() if isinstance(token, Token)] == [0]


def test_with_overlap_a_step_is_launched_before_the_one_before_is_known():
    engine, models = make(small(), Policy(), overlap=True)
    engine.add(Request("a", PROMPT, GREEDY, max_new_tokens=3))
    launched = []
    step = models["step_t1_r1"]
    models["step_t1_r1"] = lambda *inputs: launched.append(inputs[1].to_numpy().tolist()) or step(*inputs)
    assert engine.step() == []
    first = engine.step()
    assert [token.id for token in first if isinstance(token, Token)] == answer_to(Request("", PROMPT), 16)[:1]
    assert launched == [[0]], "the second step takes its token from the first's ids"
    second, third = engine.step(), engine.step()
    assert [token.finish_reason for token in second + third if isinstance(token, Token)] == [None, "length"]
    assert len(launched) == 2, "nothing is computed beyond a length that is known"
    assert engine.is_idle


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_with_penalties_waits_for_its_own_last_token(overlap):
    engine, _ = make(small(), Policy(), overlap)
    request = Request("a", PROMPT, COUNTED, max_new_tokens=5)
    engine.add(request)
    assert collect(engine) == {"a": answer_to(request, 16)}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
@given(
    requests=st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.booleans()), max_size=8),
    rows=st.integers(1, 4),
    num_pages=st.integers(5, 12),
)
@settings(max_examples=settings().max_examples // 6)
def test_every_token_of_a_scored_prompt_has_its_logits(policy, overlap, requests, rows, num_pages):
    """The logit is 1 where the token is the one that follows, and 0 elsewhere, whatever gave way or was cached."""
    engine, _ = make(small(num_pages=num_pages, max_batch=rows), policy, overlap)
    asked = [
        Request(str(i), prompt, GREEDY, max_new_tokens=5, top_logprobs=1, prompt_logprobs=is_scored)
        for i, (prompt, is_scored) in enumerate(requests)
    ]
    for request in asked:
        engine.add(request)
    first: dict[str, Token] = {}
    while not engine.is_idle:
        for token in engine.step():
            assert isinstance(token, Token)
            if token.request_id in first:
                assert token.prompt_logprobs is None
            first.setdefault(token.request_id, token)
    for request in asked:
        given = first[request.id].prompt_logprobs
        if not request.prompt_logprobs:
            assert given is None
            continue
        follows = [following(list(request.prompt[:place])) for place in range(1, len(request.prompt))]
        assert given is not None and [each.top_ids for each in given] == [[token] for token in follows]
        assert [each.token for each in given] == [
            float(token == wanted) for token, wanted in zip(request.prompt[1:], follows, strict=True)
        ]


def test_a_scored_prompt_whose_logits_are_no_numbers_fails():
    engine, models = make(small(), Policy(), overlap=False)
    models.fault = "NaN"
    engine.add(Request("a", [1, 3, 2, 4, 5], GREEDY, max_new_tokens=2, top_logprobs=0, prompt_logprobs=True))
    (failure,) = engine.step()
    assert isinstance(failure, Failure) and engine.is_idle


@pytest.mark.parametrize("overlap", [False, True])
def test_logprobs_go_to_those_that_asked(overlap):
    engine, _ = make(small(), Policy(), overlap)
    engine.add(Request("a", PROMPT, GREEDY, max_new_tokens=1, top_logprobs=2))
    engine.add(Request("b", PROMPT, GREEDY, max_new_tokens=1, top_logprobs=0))
    engine.add(Request("c", [4], GREEDY, max_new_tokens=1))
    tokens = {}
    while not engine.is_idle:
        tokens |= {token.request_id: token for token in engine.step() if isinstance(token, Token)}
    best = following(PROMPT)
    shown = tokens["a"].logprobs
    assert (shown.token, shown.top_ids[0], shown.top) == (1.0, best, [1.0, 0.0])
    assert (tokens["b"].logprobs.token, tokens["b"].logprobs.top) == (1.0, [])
    assert tokens["c"].logprobs is None


@pytest.mark.parametrize("overlap", [False, True])
def test_logits_that_are_no_numbers_fail_their_request_and_no_other(overlap):
    engine, models = make(small(), Policy(), overlap)
    engine.add(Request("a", PROMPT, GREEDY, max_new_tokens=4))
    engine.add(Request("b", [4], GREEDY, max_new_tokens=4))
    models.fault = "NaN"
    results = engine.step()
    models.fault = ""
    failed, token = results or engine.step()  # with overlap, the next step has been launched on what there is not
    assert isinstance(failed, Failure)
    assert (failed.request_id, failed.error.kind) == ("a", "internal")
    assert "not finite numbers" in failed.error.message
    assert isinstance(token, Token)
    assert [token.id, *collect(engine)["b"]] == answer_to(Request("b", [4], max_new_tokens=4), 16)
    assert engine.stats.ended == {"failed": 1, "finished": 1}
    assert engine.scheduler.pages.free == 8


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_raises_fails_its_requests_and_no_other(overlap):
    engine, models = make(small(max_batch=2), Policy(), overlap)
    for name in "abc":
        engine.add(Request(name, PROMPT, GREEDY, max_new_tokens=4))
    models.fault = "raises"
    failures = engine.step()
    assert [each.request_id for each in failures if isinstance(each, Failure)] == ["a", "b"]
    assert all("out of luck" in each.error.message for each in failures if isinstance(each, Failure))
    models.fault = ""
    assert collect(engine) == {"c": answer_to(Request("c", PROMPT, max_new_tokens=4), 16)}
    assert engine.stats.ended == {"failed": 2, "finished": 1}


def test_an_engine_without_its_pages_fails_every_request_and_says_so():
    def lost() -> None:
        raise MaxError("the state was lost")

    engine, models = make(small(max_batch=2), Policy(), overlap=False, check_state=lost)
    for name in "abc":
        engine.add(Request(name, PROMPT, GREEDY))
    models.fault = "raises"
    with pytest.raises(EngineLost) as caught:
        engine.step()
    assert [failure.request_id for failure in caught.value.failures] == ["a", "b", "c"]
    assert engine.stats.ended == {"failed": 3}


def test_requests_beyond_the_queue_are_refused():
    engine, _ = make(small(max_batch=2), Policy(), overlap=False, max_waiting=1)
    for name in "abc":
        engine.add(Request(name, PROMPT, GREEDY, max_new_tokens=2))
    with pytest.raises(CapacityError):
        engine.add(Request("d", PROMPT, GREEDY))
    assert set(collect(engine)) == set("abc")
    assert engine.stats.ended == {"rejected": 1, "finished": 3}


def test_without_a_queue_there_are_as_many_requests_as_rows():
    engine, _ = make(small(max_batch=2), Policy(), overlap=False, max_waiting=0)
    for name in "ab":
        engine.add(Request(name, PROMPT, GREEDY, max_new_tokens=2))
    with pytest.raises(CapacityError, match="0 wait already"):
        engine.add(Request("c", PROMPT, GREEDY))
    assert set(collect(engine)) == set("ab")
    engine.add(Request("d", PROMPT, GREEDY, max_new_tokens=2))
    assert set(collect(engine)) == {"d"}


def test_a_bound_on_requests_in_work_leaves_the_others_waiting():
    engine, _ = make(small(max_batch=3), Policy(max_running=1), overlap=False, max_waiting=1)
    for name in "ab":
        engine.add(Request(name, PROMPT, GREEDY, max_new_tokens=2))
    with pytest.raises(CapacityError):
        engine.add(Request("c", PROMPT, GREEDY))
    assert set(collect(engine)) == set("ab")
