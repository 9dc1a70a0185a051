"""Sampling parameters are checked when they are made, and reach the graph in its rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from max import RequestError
from max.runtime.model import Buffer
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
    """Stands for the models: keeps what each was called with."""

    called: str
    inputs: list[np.ndarray]

    def __missing__(self, name: str) -> Any:
        def call(*inputs: Any) -> list[str]:
            self.called, self.inputs = name, [np.asarray(value) for value in inputs[1:]]
            return [name]

        return call


def sampled(*rows: SampledRow, count: int | None = None) -> Recorder:
    models = Recorder()
    count = count or len(rows)
    Sampler(models, vocab_size=8).sample(Buffer(None, "float32", (count, 8)), rows)
    return models


def test_greedy_rows_take_the_small_graph_unless_something_changes_the_logits():
    row = SampledRow(GREEDY, [1], [2], 5)
    assert sampled(row, row).called == "sample_greedy_r2"
    for other in (
        SampledRow(SamplingParams(), [1], [], 1),
        SampledRow(GREEDY, [1], [], 1, banned=[3]),
        SampledRow(SamplingParams(temperature=0, presence_penalty=0.5), [1], [], 1),
        SampledRow(SamplingParams(temperature=0, bias={2: 1.0}), [1], [], 1),
    ):
        assert sampled(row, other).called == "sample_full_r2"


def test_rows_of_the_full_graph():
    first = SamplingParams(0.5, 7, 0.9, 0.1, 1.2, 0.3, 0.4, seed=(5 << 32) + 6, bias={2: 1.5, 3: -1.0})
    second = SamplingParams(top_k=1 << 40, presence_penalty=1.0)
    rows = [SampledRow(first, [1, 1, 4], [2], 9, banned=[3]), SampledRow(second, [0], [], 4)]
    bias, prompt, output, temperature, top_k, top_p, min_p, repetition, frequency, presence, seeds, positions = sampled(
        *rows, count=3
    ).inputs
    assert bias.tolist() == [[0, 0, 1.5, -math.inf, 0, 0, 0, 0], [0] * 8, [0] * 8]
    assert prompt.tolist() == [[0, 2, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert output.tolist() == [[0, 0, 1, 0, 0, 0, 0, 0], [0] * 8, [0] * 8]
    np.testing.assert_array_equal(temperature, np.array([0.5, 1, 0], np.float32))
    assert top_k.tolist() == [7, 8, 0]
    np.testing.assert_array_equal(top_p, np.array([0.9, 1, 1], np.float32))
    np.testing.assert_array_equal(min_p, np.array([0.1, 0, 0], np.float32))
    np.testing.assert_array_equal(repetition, np.array([1.2, 1, 1], np.float32))
    np.testing.assert_array_equal(frequency, np.array([0.3, 0, 0], np.float32))
    np.testing.assert_array_equal(presence, np.array([0.4, 1, 0], np.float32))
    assert seeds.tolist() == [[6, 5], [0, 0], [0, 0]]
    assert positions.tolist() == [9, 4, 0]


def test_without_penalties_nothing_is_counted():
    models = sampled(SampledRow(SamplingParams(), [1, 1], [2], 3))
    assert not any(array.any() for array in models.inputs[:3])


def test_log_probabilities_are_asked_for_logits_and_ids():
    models = Recorder()
    ids = Buffer(np.zeros(4, np.int32), "int32", (4,))
    models["sample_logprobs_r2"] = lambda *inputs: [*inputs, "top"]
    logits = Buffer(None, "float32", (2, 8))
    assert Sampler(models, vocab_size=8).logprobs(logits, ids) == (logits, ids, "top")
