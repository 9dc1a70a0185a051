"""Canonical JSON: what it keeps apart, what it holds together, and what it refuses."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from max.cache.canonical import canonical_json, plain

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(values)
def test_reads_back_as_the_plain_value(value):
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)
    assert json.loads(canonical_json(value)) == plain(value)


@given(st.dictionaries(st.text(), scalars, min_size=2))
def test_order_of_keys_does_not_count(mapping):
    assert canonical_json(mapping) == canonical_json(dict(reversed(mapping.items())))


def test_bytes_are_the_expected_ones():
    assert canonical_json({"b": (1, 2.5), "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5]}'


def test_integers_floats_and_booleans_stay_apart():
    assert len({canonical_json(value) for value in (1, 1.0, True, "1")}) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: "a"}, b"bytes", {"a": [{"b": object()}]}, {1, 2}])
def test_refuses_what_json_cannot_hold(value):
    with pytest.raises(TypeError):
        canonical_json(value)


def test_refusal_names_the_place():
    with pytest.raises(TypeError, match=r"value\.a\[1\]\.b"):
        canonical_json({"a": [0, {"b": 1j}]})
