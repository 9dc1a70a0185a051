"""Sampling parameters are checked when they are made, and reach the graph in its rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from max import RequestError
from max.compiler.sampling import NUMBERS, SETTINGS
from max.runtime.model import Buffer, share
from max.runtime.sampling import SampledRow, Sampler, SamplingParams

GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", 101), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", -2), ("top_k", 2.5), ("top_k", math.nan),
        ("top_p", 0), ("top_p", -0.5), ("top_p", 1.1), ("top_p", math.nan),
        ("min_p", -0.1), ("min_p", 1.5), ("min_p", math.nan),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("frequency_penalty", 2.5), ("frequency_penalty", -2.5), ("frequency_penalty", math.nan),
        ("presence_penalty", 2.5), ("presence_penalty", -2.5), ("presence_penalty", math.nan),
        ("seed", -1), ("seed", 1 << 64), ("seed", 1.5),
        ("bias", {3: math.nan}), ("bias", {3: math.inf}), ("bias", {3: 101.0}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 100}, {"top_k": -1}, {"top_k": 1 << 40}, {"top_p": 1e-9}, {"top_p": 1}, {"min_p": 1},
        {"repetition_penalty": 0.01}, {"frequency_penalty": -2}, {"presence_penalty": 2}, {"seed": (1 << 64) - 1},
        {"bias": {0: -100.0, 5: 100.0}},
    ],
)  # fmt: skip
def test_the_ends_of_every_range_are_in_it(fields):
    SamplingParams(**fields)


def test_greedy_is_temperature_zero_or_one_candidate():
    assert GREEDY.is_greedy
    assert SamplingParams(top_k=1).is_greedy
    assert SamplingParams(temperature=1e-42).is_greedy, "zero in float32"
    assert not SamplingParams(temperature=0.01, top_k=2).is_greedy


class Recorder(dict[str, Any]):
    """Stands for the models: keeps what each was called with, as it is after the call."""

    called: str
    inputs: list[np.ndarray]

    def __missing__(self, name: str) -> Any:
        def call(*inputs: Any) -> list[Buffer]:
            self.called, self.inputs = name, [np.array(value) for value in inputs[1:]]
            return [share(np.zeros(3, np.int32))]

        return call


LOGITS = {rows: Buffer(None, "float32", (rows, 8)) for rows in (1, 2, 3)}


def row_of(params: SamplingParams, request: str = "a", prompt=(1,), output=(), position=1, **more: Any) -> SampledRow:
    return SampledRow(request, params, prompt, output, position, **more)


def sampled(*rows: SampledRow, count: int | None = None) -> Recorder:
    models = Recorder()
    Sampler(models, vocab_size=8, max_batch=3).sample(LOGITS[count or len(rows)], rows)
    return models


def test_greedy_rows_take_the_small_graph_unless_something_changes_the_logits():
    row = row_of(GREEDY, output=[2])
    assert sampled(row, row).called == "sample_greedy_r2"
    for other in (
        row_of(SamplingParams()),
        row_of(GREEDY, banned=[3]),
        row_of(GREEDY, allowed=np.array([5], np.int32)),
        row_of(SamplingParams(temperature=0, presence_penalty=0.5)),
        row_of(SamplingParams(temperature=0, bias={2: 1.0})),
    ):
        assert sampled(row, other).called == "sample_full_r2"


def test_rows_of_the_full_graph():
    first = SamplingParams(0.5, 7, 0.9, 0.1, 1.2, 0.3, 0.4, seed=(5 << 32) + 0xFFFFFFFE, bias={2: 1.5, 3: -1.0})
    second = SamplingParams(top_k=1 << 40, presence_penalty=1.0)
    rows = [row_of(first, "a", [1, 1, 4], [2], 9, banned=[3, 7]), row_of(second, "b", [0], [], 4)]
    mask, history, bias, settings, numbers = sampled(*rows, count=3).inputs
    assert mask.tolist() == [[~(1 << 3 | 1 << 7)], [-1], [-1]]
    at = numbers[:, NUMBERS.index("adjusted")].tolist()
    assert sorted(at[:2]) == sorted(set(at[:2])) and at[2] == -1
    assert history[at[0]].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert history[at[1]].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert bias[at[0]].tolist() == [0, 0, 1.5, -1, 0, 0, 0, 0]
    assert not bias[at[1]].any()
    by_name = dict(zip(SETTINGS, settings.T.tolist(), strict=True))
    wanted = {
        "temperature": [0.5, 1, 0], "top_p": [0.9, 1, 0], "min_p": [0.1, 0, 0], "repetition_penalty": [1.2, 1, 0],
        "frequency_penalty": [0.3, 0, 0], "presence_penalty": [0.4, 1, 0],
    }  # fmt: skip
    assert by_name == {name: np.array(values, np.float32).tolist() for name, values in wanted.items()}
    by_name = dict(zip(NUMBERS, numbers.T.tolist(), strict=True))
    assert by_name["top_k"] == [7, 8, 0]
    assert by_name["position"] == [9, 4, 0]
    assert (by_name["seed_low"], by_name["seed_high"]) == ([-2, 0, 0], [5, 0, 0])


def test_without_penalties_nothing_is_counted():
    _, history, bias, _, numbers = sampled(row_of(SamplingParams(), prompt=[1, 1], output=[2])).inputs
    assert not history.any() and not bias.any()
    assert numbers[0, -1] == -1


def test_history_follows_the_output_and_goes_with_its_request():
    models, params = Recorder(), SamplingParams(frequency_penalty=1, bias={6: 2.0})
    sampler = Sampler(models, vocab_size=8, max_batch=2)

    def history_of(*rows: SampledRow) -> tuple[list[list[int]], list[list[float]]]:
        sampler.sample(LOGITS[len(rows)], rows)
        _, history, bias, _, numbers = models.inputs
        at = numbers[:, NUMBERS.index("adjusted")]
        return history[at].tolist(), bias[at].tolist()

    assert history_of(row_of(params, "a", [1], [])) == ([[0, 1, 0, 0, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 0, 2, 0]])
    both = row_of(params, "a", [1], [1, 3]), row_of(SamplingParams(presence_penalty=1), "b", [0], [0])
    assert history_of(*both)[0] == [[0, 3, 0, 2, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0, 0]]
    assert history_of(row_of(params, "a", [1], [1, 3, 3, 1]))[0] == [[0, 5, 0, 4, 0, 0, 0, 0]]
    # Others take the rows of those that are gone, and find them empty.
    for name in ("c", "d", "e"):
        new = row_of(SamplingParams(repetition_penalty=2), name, [7], [])
        assert history_of(new) == ([[0, 0, 0, 0, 0, 0, 0, 1]], [[0] * 8])
    # One that was put back for a while is counted anew, and one that starts over under the same name too.
    assert history_of(row_of(params, "a", [1], [1, 3]))[0] == [[0, 3, 0, 2, 0, 0, 0, 0]]
    assert history_of(row_of(params, "a", [2], []))[0] == [[0, 0, 1, 0, 0, 0, 0, 0]]


def test_log_probabilities_are_asked_for_logits_and_ids():
    models = Recorder()
    ids = Buffer(np.zeros(4, np.int32), "int32", (4,))
    models["sample_logprobs_r2"] = lambda *inputs: [*inputs, "top"]
    assert Sampler(models, vocab_size=8, max_batch=4).logprobs(LOGITS[2], ids) == (LOGITS[2], ids, "top")
