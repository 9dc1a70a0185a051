"""The engine over a model that can be checked by hand: the next token is a sum over what lies in the row's pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from max import RequestError
from max.compiler import xla
from max.compiler.limits import Limits
from max.compiler.sampling import NUMBERS
from max.runtime.engine import Engine
from max.runtime.model import Buffer
from max.runtime.request import Request
from max.runtime.sampling import SamplingParams
from max.runtime.step_results import Token

VOCAB = 11
LIMITS = Limits(max_length=16, max_batch=3, page_tokens=4, num_pages=9, token_buckets=(1, 2, 4, 8))
GREEDY = SamplingParams(temperature=0)


def following(tokens: list[int]) -> int:
    """The token that the model gives after these."""
    return (sum(tokens) + len(tokens)) % VOCAB


def continuation(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


class SumModels(dict[str, Any]):
    """Steps that keep tokens in pages, and samplers that take the largest biased logit."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.page_tokens = limits.page_tokens
        self.slots = np.full(limits.num_pages * limits.page_tokens, -999)
        self.called: list[str] = []
        for tokens in limits.token_buckets:
            for rows in limits.logit_rows(tokens):
                self[f"step_t{tokens}_r{rows}"] = self.counting(f"step_t{tokens}_r{rows}", self.step)
        for rows in limits.row_buckets:
            self[f"sample_greedy_r{rows}"] = self.counting(f"sample_greedy_r{rows}", self.sample)
            self[f"sample_full_r{rows}"] = self.counting(f"sample_full_r{rows}", self.sample)

    def counting(self, name: str, function: Any) -> Any:
        def call(*inputs: Any) -> list[Buffer]:
            self.called.append(name)
            return [function(*inputs)]

        return call

    def step(self, *inputs: Buffer) -> Buffer:
        tokens, _, _, positions, rows, slots, page_table, lengths, logit_rows = (each.to_numpy() for each in inputs)
        self.slots[slots[rows >= 0]] = tokens[rows >= 0]
        logits = np.zeros((len(logit_rows), VOCAB), np.float32)
        for i, token in enumerate(logit_rows):
            row, count = rows[token], int(positions[token]) + 1
            assert lengths[row] >= count
            place = np.arange(count)
            seen = self.slots[page_table[row, place // self.page_tokens] * self.page_tokens + place % self.page_tokens]
            logits[i, following(seen.tolist())] = 1
        return Buffer(xla.put(logits), "float32", logits.shape)

    def sample(self, logits: Buffer, mask: Any = None, history: Any = None, bias: Any = None, *rest: Any) -> Buffer:
        values = logits.to_numpy().copy()
        if mask is not None:
            adjusted = rest[1][:, NUMBERS.index("adjusted")]
            values += np.where(adjusted[:, None] >= 0, bias.to_numpy()[adjusted], 0)
            allowed = np.unpackbits(np.asarray(mask).view(np.uint8), axis=1, bitorder="little")[:, :VOCAB]
            values = np.where(allowed, values, -np.inf)
        ids = np.argmax(values, axis=-1).astype(np.int32)
        return Buffer(xla.put(ids), "int32", ids.shape)


class ModelsThatSample(SumModels):
    """Steps of decoding give the likeliest tokens themselves."""

    def counting(self, name: str, function: Any) -> Any:
        call = super().counting(name, function)

        def call_with_ids(*inputs: Any) -> list[Buffer]:
            (logits,) = call(*inputs)
            return [logits, self.sample(logits)]

        return call_with_ids if name == "step_t1_r1" else call


def engine(limits: Limits = LIMITS) -> Engine:
    models = SumModels(limits)
    return Engine(models, limits, VOCAB, overlap=False)


def run(engine: Engine) -> dict[str, list[Token]]:
    answers: dict[str, list[Token]] = {}
    while not engine.is_idle:
        for token in step(engine):
            answers.setdefault(token.request_id, []).append(token)
    return answers


def step(engine: Engine) -> list[Token]:
    """What a step gives that fails nobody."""
    tokens = []
    for token in engine.step():
        assert isinstance(token, Token)
        tokens.append(token)
    return tokens


def answer(request: Request) -> tuple[list[int], str | None]:
    runner = engine()
    runner.add(request)
    tokens = run(runner)[request.id]
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert runner.stats.ended == {"finished": 1}
    assert runner.scheduler.pages.free == LIMITS.num_pages - 1
    return [token.id for token in tokens], tokens[-1].finish_reason


# 1 2 3 is followed by 9, 8 (23 + 4 = 27 = 5 mod 11), ...
PROMPT = [1, 2, 3]
AFTER = continuation(PROMPT, 13)


def test_the_reference_by_hand():
    assert AFTER[:3] == [(6 + 3) % 11, (15 + 4) % 11, (23 + 5) % 11] == [9, 8, 6]


def test_length_limits():
    assert answer(Request("a", PROMPT, GREEDY, max_new_tokens=5)) == (AFTER[:5], "length")
    assert answer(Request("a", PROMPT, GREEDY)) == (AFTER, "length"), "the context's end"
    assert answer(Request("a", [1] * 15, GREEDY)) == (continuation([1] * 15, 1), "length")


def test_stop_tokens_end_the_output_and_belong_to_it():
    assert answer(Request("a", PROMPT, GREEDY, stop_tokens=frozenset({6}))) == (AFTER[:3], "stop")
    assert answer(Request("a", PROMPT, GREEDY, max_new_tokens=3, stop_tokens=frozenset({6}))) == (AFTER[:3], "stop")


def test_a_stop_token_in_the_prompt_stops_nothing():
    tokens, _ = answer(Request("a", PROMPT, GREEDY, max_new_tokens=2, stop_tokens=frozenset({3})))
    assert tokens == AFTER[:2]


def test_ignore_eos():
    request = Request("a", PROMPT, GREEDY, max_new_tokens=5, stop_tokens=frozenset({6}), ignore_eos=True)
    assert answer(request) == (AFTER[:5], "length")


def test_min_new_tokens_bans_stop_tokens_until_then():
    # Where 9 is banned, the next best is token 0; 10 follows that.
    assert continuation([*PROMPT, 0], 1) == [10]
    request = Request("a", PROMPT, GREEDY, min_new_tokens=1, stop_tokens=frozenset({9, 10}))
    assert answer(request) == ([0, 10], "stop")


def test_a_stop_token_may_come_right_after_min_new_tokens():
    assert answer(Request("a", PROMPT, GREEDY, min_new_tokens=2, stop_tokens=frozenset({6}))) == (AFTER[:3], "stop")


def test_chunked_prompts_give_the_same_tokens_and_count_as_prefill():
    prompt = [(3 * i) % VOCAB for i in range(11)]
    runner = engine()
    runner.add(Request("a", prompt, GREEDY, max_new_tokens=3))
    assert runner.step() == []
    assert [token.id for token in run(runner)["a"]] == continuation(prompt, 3)
    stats = runner.stats
    assert (stats.prefill_tokens, stats.decode_tokens, stats.steps) == (11, 2, 4)
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0


def test_abort_frees_everything_at_any_time():
    runner = engine()
    for name in "abcd":
        runner.add(Request(name, PROMPT, GREEDY, max_new_tokens=6))
    runner.abort("d")
    assert [token.id for token in step(runner)] == AFTER[:1] * 2, "c waits for the next step's budget"
    runner.abort("b")
    runner.abort("b")
    runner.abort("unknown")
    answers = run(runner)
    assert [token.id for token in answers["a"]] == AFTER[1:6]
    assert [token.id for token in answers["c"]] == AFTER[:6]
    assert answers.keys() == {"a", "c"}
    assert runner.stats.ended == {"aborted": 2, "finished": 2}
    assert runner.scheduler.pages.free == LIMITS.num_pages - 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("x", []), "no tokens"),
        (Request("x", [1] * 16), "16 tokens, and the context has room for 16"),
        (Request("x", [1, VOCAB]), "token id 11"),
        (Request("x", [1, -1]), "token id -1"),
        (Request("x", [1], stop_tokens=frozenset({99})), "token id 99"),
        (Request("x", [1], SamplingParams(bias={50: 1.0})), "token id 50"),
        (Request("x", [1], max_new_tokens=0), "max_new_tokens is 0"),
        (Request("taken", [1]), "request taken"),
    ],
)
def test_what_cannot_be_answered_is_rejected_and_counted(request_, message):
    runner = engine()
    runner.add(Request("taken", PROMPT, GREEDY, max_new_tokens=2))
    with pytest.raises(RequestError, match=message) as caught:
        runner.add(request_)
    assert caught.value.hint
    assert runner.stats.ended == {"rejected": 1}
    assert [token.id for token in run(runner)["taken"]] == AFTER[:2]


def test_an_id_can_be_used_again_once_its_request_has_ended():
    runner = engine()
    for _ in range(2):
        runner.add(Request("a", PROMPT, GREEDY, max_new_tokens=1))
        assert [token.id for token in run(runner)["a"]] == AFTER[:1]


def test_an_idle_engine_does_nothing():
    runner = engine()
    assert runner.is_idle
    assert runner.step() == []
    assert runner.stats.steps == 0


@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=15), st.integers(1, 15), st.integers(0, 10)),
        min_size=1, max_size=8,
    ),
    num_pages=st.integers(5, 14),
)  # fmt: skip
def test_no_mix_of_requests_changes_an_answer(requests, num_pages):
    """requests: prompt, new tokens, step of arrival. Few pages make some give way to others and start again."""
    runner = engine(Limits(16, 3, 4, num_pages, (1, 2, 4, 8)))
    answers: dict[str, list[int]] = {}
    for moment in range(600):
        for index, (prompt, new, arrival) in enumerate(requests):
            if arrival == moment:
                runner.add(Request(str(index), prompt, GREEDY, max_new_tokens=new))
        for token in step(runner):
            answers.setdefault(token.request_id, []).append(token.id)
        if moment > 10 and runner.is_idle:
            break
    assert runner.is_idle
    for index, (prompt, new, _) in enumerate(requests):
        assert answers[str(index)] == continuation(prompt, min(new, 16 - len(prompt)))
    assert runner.stats.ended == {"finished": len(requests)}
    assert runner.scheduler.pages.free == num_pages - 1


def test_a_step_that_computes_a_prompt_reports_the_tokens_of_answers_too():
    runner = engine()
    runner.add(Request("a", PROMPT, GREEDY, max_new_tokens=9))
    step(runner)
    runner.add(Request("b", PROMPT, GREEDY, max_new_tokens=9))
    given = step(runner)
    report = runner.stats.take_last_step()
    assert report is not None and report.is_prefill
    assert (report.new_tokens, report.input_tokens) == (len(given), 4) == (2, 4)


@pytest.mark.parametrize("bias", [{}, {3: 5.0}])
def test_ids_that_a_step_gives_are_taken_where_nothing_changes_its_logits(bias: dict[int, float]) -> None:
    models = ModelsThatSample(LIMITS)
    runner = Engine(models, LIMITS, VOCAB, overlap=False)
    runner.add(Request("a", [1, 2, 3], SamplingParams(temperature=0, bias=bias), 4))
    found = [token.id for token in run(runner)["a"]]
    assert found == ([3] * 4 if bias else continuation([1, 2, 3], 4))
    decoding = models.called[models.called.index("step_t1_r1") :]
    assert decoding == (["step_t1_r1", "sample_full_r1"] * 3 if bias else ["step_t1_r1"] * 3)
