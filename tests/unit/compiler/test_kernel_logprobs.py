"""The log probabilities of the kernel and of plain XLA against float64, for every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from max.compiler.native import ISAS, library
from max.models import gpu_kernels
from max.models.sampler import logprobs

LIB = library()
VARIANTS = ["xla", "triton", *(isa for isa in ISAS if LIB is not None and LIB.supports(isa))]
Told = tuple[np.ndarray, np.ndarray, np.ndarray]
GRAPHS = {"xla": jax.jit(logprobs, static_argnums=2), "triton": jax.jit(gpu_kernels.logprobs, static_argnums=2)}


@pytest.fixture(params=VARIANTS)
def tell(request: pytest.FixtureRequest) -> Iterator[Callable[..., Told]]:
    """(logits, ids, num_top) to their log probabilities."""
    yield partial(told, request.param)
    if LIB is not None:
        LIB.select("")
        LIB.set_num_threads(0)


def told(variant: str, logits: np.ndarray, ids: np.ndarray, num_top: int) -> Told:
    if variant in GRAPHS:
        chosen, top_ids, top = GRAPHS[variant](jnp.asarray(logits), jnp.asarray(ids), num_top)
        return np.asarray(chosen), np.asarray(top_ids), np.asarray(top)
    assert LIB is not None
    LIB.select(variant)
    return LIB.logprobs(logits, ids, num_top)


LIMIT = float(np.finfo(np.float32).max)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=1, keepdims=True)
    return np.maximum(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), -LIMIT)


def check(tell: Callable[..., Told], logits: np.ndarray, num_top: int) -> None:
    rows, columns = logits.shape
    ids = np.random.default_rng(1).integers(0, columns, rows).astype(np.int32)
    chosen, top_ids, top = tell(logits, ids, num_top)
    x = np.nan_to_num(logits.astype(np.float64), nan=-LIMIT, posinf=LIMIT, neginf=-LIMIT)
    want = log_softmax(x)
    # Ties keep the order of their columns.
    want_ids = np.argsort(-x, axis=1, kind="stable")[:, :num_top]
    near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # XLA approximates exponentials
    np.testing.assert_allclose(chosen, np.take_along_axis(want, ids[:, None].astype(np.int64), 1)[:, 0], **near)
    np.testing.assert_array_equal(top_ids, want_ids)
    np.testing.assert_allclose(top, np.take_along_axis(want, want_ids, 1), **near)
    assert chosen.dtype == top.dtype == np.float32


@pytest.mark.quick(columns=[1, 301])
@pytest.mark.parametrize("columns", [1, 7, 20, 64, 301, 5000, 40_000, 1 << 18])
def test_log_probabilities_are_those_of_float64(tell: Callable[..., Told], columns: int) -> None:
    logits = np.random.default_rng(columns).normal(scale=4, size=(3, columns)).astype(np.float32)
    check(tell, logits, min(20, columns))


def test_ties_and_steps_keep_the_order_of_columns(tell: Callable[..., Told]) -> None:
    logits = np.zeros((4, 700), np.float32)
    logits[1] = np.arange(700) // 100
    logits[2] = -np.arange(700) // 3
    logits[3, 333] = 9
    check(tell, logits, 20)


def test_what_is_no_number_counts_as_the_lowest(tell: Callable[..., Told]) -> None:
    logits = np.random.default_rng(2).normal(size=(5, 90)).astype(np.float32)
    logits[0, 17] = np.nan
    logits[1, :80] = -np.inf
    logits[2] = np.nan
    logits[3, [4, 50]] = np.inf
    check(tell, logits, 20)
    none, first = (tell(logits, np.full(5, token, np.int32), 20)[0] for token in (-1, 0))
    np.testing.assert_array_equal(none, first)  # a row without a token has some number too


@settings(max_examples=settings().max_examples * 2 // 5, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS[1:] or VARIANTS),
    columns=st.integers(1, 400),
    num_top=st.integers(1, 40),
    levels=st.integers(1, 500),
    seed=st.integers(0, 99),
)
def test_any_row(variant: str, columns: int, num_top: int, levels: int, seed: int) -> None:
    """Few levels make many ties."""
    logits = np.random.default_rng(seed).integers(-levels, levels, (2, columns)).astype(np.float32) / 16
    try:
        check(partial(told, variant), logits, min(num_top, columns))
    finally:
        if LIB is not None:
            LIB.select("")


@pytest.mark.skipif(LIB is None, reason="the package was installed without a C++ compiler")
def test_an_id_out_of_range_is_refused() -> None:
    assert LIB is not None
    logits = np.zeros((2, 5), np.float32)
    for ids in ([0, 5], [-2, 0]):
        with pytest.raises(ValueError, match="out of range"):
            LIB.logprobs(logits, np.array(ids, np.int32), 3)
    with pytest.raises(ValueError, match="highest"):
        LIB.logprobs(logits, np.zeros(2, np.int32), 6)
