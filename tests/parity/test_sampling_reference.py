"""The sampling reference against the logits processors of transformers (references/sampling.npz), and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sampling_reference import keep_min_p, keep_top_k, keep_top_p, penalize, probabilities, softmax

HERE = Path(__file__).parent
SETTINGS = json.loads((HERE / "sampling.json").read_text())


@pytest.fixture(scope="module")
def reference():
    with np.load(HERE / "references" / "sampling.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=lambda index: json.dumps(SETTINGS[index]))
def test_chances_are_those_of_transformers(index, reference):
    rows = zip(reference["logits"], reference["seen"], reference["probabilities"][index], strict=True)
    for logits, seen, wanted in rows:
        got = probabilities(logits, seen.tolist(), **SETTINGS[index])
        np.testing.assert_array_equal(got > 0, wanted > 0)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_stored_settings_differ(reference):
    """Guards the reference itself: no setting is without effect, but for the top-k that is as large as the row."""
    plain = np.apply_along_axis(softmax, 1, reference["logits"])
    idle = [SETTINGS[i] for i, chances in enumerate(reference["probabilities"]) if np.allclose(chances, plain)]
    assert idle == [{"top_k": reference["logits"].shape[1]}]


def test_frequency_counts_and_presence_does_not():
    logits = np.array([1.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(penalize(logits, [0], [1, 2, 2], frequency=0.5, presence=0.25), [1, 0.25, -0.25, 1])


def test_repetition_looks_at_prompt_and_output_and_makes_both_signs_less_likely():
    logits = np.array([2.0, -2.0, 2.0, -2.0])
    np.testing.assert_allclose(penalize(logits, [0], [1, 1], repetition=2.0), [1, -4, 2, -2])


def test_repetition_comes_before_the_subtracted_penalties():
    np.testing.assert_allclose(penalize(np.array([2.0, 0.0]), [], [0], 2.0, 0.5, 0.25), [0.25, 0.0])


def test_ties_are_kept():
    logits = np.log([0.4, 0.2, 0.2, 0.15, 0.05])
    assert np.isfinite(keep_top_k(logits, 2)).tolist() == [True, True, True, False, False]
    assert np.isfinite(keep_top_p(logits, 0.5)).tolist() == [True, True, True, False, False]
    assert np.isfinite(keep_min_p(logits, 0.45)).tolist() == [True, True, True, False, False]


def test_top_p_applies_within_top_k():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # Of the two that top-k keeps, the first has 4/7: enough for 0.55, though it has 0.4 of the whole.
    assert probabilities(logits, top_k=2, top_p=0.55).tolist() == [1, 0, 0, 0]
    assert (probabilities(logits, top_p=0.55) > 0).tolist() == [True, True, False, False]


def test_temperature_zero_takes_the_first_of_the_most_likely():
    assert probabilities(np.array([0.0, 3.0, 3.0]), temperature=0).tolist() == [0, 1, 0]


def test_bias_bans_and_forces():
    logits = np.array([5.0, 0.0, 0.0])
    assert probabilities(logits, bias=np.array([-np.inf, 0, 0])).tolist() == [0, 0.5, 0.5]
    assert probabilities(logits, bias=np.array([0, 100.0, 0]), temperature=0).tolist() == [0, 1, 0]
