"""The pool holds what it must and no more than it can, and every step that may be planned has a graph."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from max.compiler.limits import Limits, choose_limits

MIB = 1 << 20
SIZES: dict[str, Any] = {
    "max_length": 1024,
    "max_batch": 8,
    "page_tokens": 16,
    "max_step_tokens": 256,
    "page_bytes": 64 << 10,
}


def chosen(**changes: Any) -> Limits:
    return choose_limits(**{**SIZES, **changes})


def test_defaults_take_256_mib_and_page_zero():
    limits = chosen(max_batch=256)
    assert limits.num_pages == 256 * MIB // (64 << 10) + 1
    assert limits.max_pages == 64


def test_a_pool_never_exceeds_a_full_batch_of_full_rows():
    assert chosen().num_pages == 8 * 64 + 1


def test_a_row_of_full_length_fits_even_where_it_exceeds_the_default():
    assert chosen(page_bytes=64 * MIB).num_pages == 64 + 1


@pytest.mark.parametrize(("total_tokens", "pages"), [(1, 64), (1024, 64), (1025, 68), (5000, 320)])
def test_asked_for_tokens_round_up_to_one_of_few_sizes(total_tokens, pages):
    assert chosen(total_tokens=total_tokens).num_pages == pages + 1


@pytest.mark.parametrize(
    ("pool_mib", "pages"), [(1, 64), (5, 76), (32, 496), (32.0625, 512), (500, 7936), (10_000, 1 << 16)]
)
def test_a_pool_fills_what_there_is_in_one_of_a_few_sizes(pool_mib: float, pages: int) -> None:
    """A page of 64 KiB; page 0 is one more, and a row of full length takes 64."""
    limits = chosen(pool_bytes=int(pool_mib * MIB))
    assert limits.num_pages == pages + 1
    assert limits.num_pages <= max(16 * pool_mib, 65), "no more than there is room for"


def test_tokens_that_are_asked_for_go_before_the_room_there_is() -> None:
    assert chosen(total_tokens=1025, pool_bytes=500 * MIB).num_pages == 68 + 1


def test_buckets_are_powers_of_two_that_hold_a_chunk_and_a_decode_batch():
    assert chosen().token_buckets == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert chosen(max_step_tokens=100).token_buckets[-1] == 128
    assert chosen(max_step_tokens=2, max_batch=8).token_buckets == (1, 2, 4, 8)
    assert chosen(max_length=20).token_buckets[-1] == 32, "no step is longer than a row"


def test_row_buckets_are_those_of_the_steps():
    limits = Limits(max_length=64, max_batch=4, page_tokens=16, num_pages=9, token_buckets=(1, 2, 4, 8, 16))
    assert [limits.logit_rows(tokens) for tokens in limits.token_buckets] == [(1,), (2,), (4,), (1, 4), (1, 4)]
    assert limits.row_buckets == (1, 2, 4)


def test_a_batch_of_one_row_has_one_graph_per_bucket():
    limits = chosen(max_batch=1)
    assert {limits.logit_rows(tokens) for tokens in limits.token_buckets} == {(1,)}


def test_json_and_back():
    limits = chosen()
    assert Limits.from_json(json.loads(json.dumps(limits.to_json()))) == limits


@given(
    max_length=st.integers(1, 5000),
    max_batch=st.integers(1, 70),
    page_tokens=st.sampled_from([1, 16, 128]),
    max_step_tokens=st.integers(1, 3000),
    page_bytes=st.integers(1, 1 << 30),
    total_tokens=st.none() | st.integers(1, 1 << 20),
)
def test_whatever_is_asked_for_can_run(**sizes):
    limits = choose_limits(**sizes)
    assert limits.num_pages > limits.max_pages >= sizes["max_length"] / sizes["page_tokens"]
    assert list(limits.token_buckets) == [1 << i for i in range(len(limits.token_buckets))]
    assert limits.token_buckets[-1] >= limits.max_batch
    for tokens in limits.token_buckets:
        rows = limits.logit_rows(tokens)
        assert list(rows) == sorted(set(rows)) and set(rows) <= set(limits.row_buckets)
        assert rows[-1] == min(tokens, limits.max_batch), "every token or every row of a step can be sampled"
    if sizes["total_tokens"]:
        assert (limits.num_pages - 1) * limits.page_tokens >= sizes["total_tokens"]
