"""An answer ends where its rules say, and shows what they say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from max import RequestError
from max.serve.text_output import MAX_STOP_CHARS, MAX_STOPS, CompletionText, StopRules, TextDelta

WORDS = ["", "a", "b", "ab", "c ", "<end>", "\n\n", "é"]
EOS = 5


class Words:
    """A stream in which token n is the nth word, the last letter of each held until the next token."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_id: int) -> str:
        text = self._held + WORDS[token_id]
        self._held = text[-1:]
        return text[:-1]

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


def answer(rules: StopRules, ids: list[int]) -> tuple[str, str | None, int]:
    """The text of an answer, why it ended, and the tokens that it took."""
    completion = CompletionText(Words(), rules)
    text = "".join(completion.push(token_id).text for token_id in ids)
    return text, completion.finish_reason, completion.num_tokens


def test_a_token_that_ends_the_turn_is_not_shown() -> None:
    rules = StopRules(max_new_tokens=9, eos_token_ids=frozenset({EOS}))
    assert answer(rules, [1, 2, EOS, 1]) == ("ab", "stop", 3)


def test_a_stop_token_of_the_request_counts_even_where_eos_is_ignored() -> None:
    rules = StopRules(max_new_tokens=4, eos_token_ids=frozenset({EOS}), stop_token_ids=frozenset({2}), ignore_eos=True)
    assert answer(rules, [1, EOS, 2, 1]) == ("a<end>", "stop", 3)
    assert answer(rules, [1, EOS, EOS, 1]) == ("a<end><end>a", "length", 4)


def test_the_last_token_shows_all_that_was_held_back() -> None:
    rules = StopRules(max_new_tokens=2, stop=("abc",))
    assert answer(rules, [1, 2, 2]) == ("ab", "length", 2)


def test_a_stop_string_across_tokens_and_the_text_before_it() -> None:
    rules = StopRules(max_new_tokens=9, stop=("bc", "zz"))
    assert answer(rules, [1, 2, 4, 1, 1]) == ("a", "stop", 3)


def test_a_stop_string_in_the_held_text_makes_the_reason_stop() -> None:
    assert answer(StopRules(max_new_tokens=2, stop=("b",)), [1, 2]) == ("a", "stop", 2)


def test_nothing_stops_before_the_minimum() -> None:
    rules = StopRules(max_new_tokens=9, min_new_tokens=3, stop=("a",), eos_token_ids=frozenset({EOS}))
    assert answer(rules, [1, EOS, 3, EOS]) == ("a<end>ab", "stop", 4)
    assert answer(rules, [2, 2, 2, 2, 1, 2]) == ("bbbb", "stop", 6)


def test_tokens_behind_the_end_change_nothing() -> None:
    completion = CompletionText(Words(), StopRules(max_new_tokens=1))
    assert completion.push(3) == TextDelta("ab", "length")
    assert completion.push(3) == completion.finish("stop") == TextDelta("", "length")
    assert completion.num_tokens == 1


def test_an_answer_that_is_ended_from_outside() -> None:
    completion = CompletionText(Words(), StopRules(max_new_tokens=9, stop=("bc",)))
    assert completion.push(3) == TextDelta("a", None)
    assert completion.finish("length") == TextDelta("b", "length")


@given(
    ids=st.lists(st.integers(0, len(WORDS) - 1), max_size=12),
    stop=st.lists(st.text("abc \n", min_size=1, max_size=3), max_size=3),
    max_new_tokens=st.integers(1, 12),
    min_new_tokens=st.integers(0, 12),
)
def test_any_answer_keeps_its_bounds_and_ends_before_its_first_stop_string(
    ids: list[int], stop: list[str], max_new_tokens: int, min_new_tokens: int
) -> None:
    least = min(min_new_tokens, max_new_tokens)
    text, reason, num_tokens = answer(StopRules(max_new_tokens, least, stop, eos_token_ids=frozenset({EOS})), ids)
    assert num_tokens <= min(max_new_tokens, len(ids)) and (reason is None or num_tokens >= least)
    assert reason is not None or num_tokens == len(ids) < max_new_tokens
    if least == 0 and reason is not None:
        whole = "".join(WORDS[token_id] for token_id in ids[:num_tokens] if token_id != EOS)
        places = [place for mark in stop if (place := whole.find(mark)) >= 0]
        assert text == whole[: min(places, default=len(whole))]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": 4, "min_new_tokens": -1},
        {"max_new_tokens": 4, "min_new_tokens": 5},
        {"max_new_tokens": 4, "stop": ("a", "")},
        {"max_new_tokens": 4, "stop": ("a" * (MAX_STOP_CHARS + 1),)},
        {"max_new_tokens": 4, "stop": ("a",) * (MAX_STOPS + 1)},
        {"max_new_tokens": 4, "stop_token_ids": frozenset({1, -2})},
    ],
)
def test_rules_that_no_answer_could_follow_are_refused(wrong: dict) -> None:
    with pytest.raises(RequestError) as caught:
        StopRules(**wrong)
    assert caught.value.message and caught.value.hint
