"""Index records: strict, and CacheError for everything else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from max import CacheError
from max.cache.canonical import canonical_json
from max.cache.record import ActionRecord, decode, encode, seal

RECORD = ActionRecord(
    key="0" * 32, factors={"a": [1, 2.5]}, mef="f" * 64, bytes=10, created=1.5, command="max warm-cache", seconds=2.0
)


def test_round_trip():
    assert decode(encode(RECORD), ActionRecord, "here") == RECORD


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"key": "0" * 31},
        {"key": "0" * 32 + "\n"},
        {"key": "../" + "0" * 29},
        {"mef": "F" * 64},
        {"bytes": "10"},
        {"factors": []},
        {"extra": 1},
    ],
)
def test_refuses_other_records(changes):
    data = seal(canonical_json(json.loads(encode(RECORD))["record"] | changes))
    with pytest.raises(CacheError, match="here is damaged"):
        decode(data, ActionRecord, "here")


@given(st.binary(max_size=40) | st.integers(0, 200).map(lambda cut: encode(RECORD)[:cut]))
def test_refuses_noise(data):
    with pytest.raises(CacheError, match="here is damaged"):
        decode(data, ActionRecord, "here")


def test_every_flipped_byte_and_every_truncation_is_found():
    data = encode(RECORD)
    assert json.loads(data)["record"]["key"] == RECORD.key
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        for wrong in (bytes(damaged), data[:place], data[:place] + data[place + 1 :]):
            with pytest.raises(CacheError, match="here is damaged"):
                decode(wrong, ActionRecord, "here")


@pytest.mark.parametrize("data", [seal(b'{"factors":' + b'{"a":' * 100_000), seal(b'"\xff"'), b" " * (17 << 20)])
def test_refuses_what_would_exhaust_the_reader(data):
    with pytest.raises(CacheError):
        decode(data, ActionRecord, "here")
