"""Probes repeat exactly, and tell a changed result from a sound one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from max.compiler import Graph, TensorType, merge, probe, segments, xla, xla_compiler, xla_lowering

F = TensorType("float32", (40,))
I8, BF = TensorType("int32", (8,)), TensorType("bfloat16", (40,))
TYPES = [F, I8, BF]


def run(forward: Callable[..., Any], results: list[TensorType]) -> list[dict[str, Any]]:
    module = merge.merge("m", {"g": xla_lowering.lower(Graph("g", forward, TYPES), "cpu").stablehlo})
    code = xla_compiler.compile_stablehlo(xla_lowering.bytecode(segments.extract(module, "g", ())), "g").executable
    return probe.run(xla.load_executable(code, results), "g", TYPES)


def plain(x, i, b):
    return x * 2 + x[i].sum(), i + 3, b * 2


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return run(plain, [F, I8, BF])


def test_the_same_code_agrees_with_itself(expected):
    again = run(plain, [F, I8, BF])
    assert again == expected
    assert probe.differences(expected, again) == []


def test_inputs_are_seeded_floats_and_zero_integers(expected):
    assert expected[1] == {"finite": 8, "first": [3.0] * 8, "mean": 3.0, "norm": pytest.approx(72**0.5)}
    assert len(set(expected[0]["first"])) == 8
    assert expected[0]["first"] != expected[2]["first"], "each argument has its own numbers"


@pytest.mark.parametrize(
    "changed",
    [
        lambda x, i, b: (x * 2.001 + x[i].sum(), i + 3, b * 2),
        lambda x, i, b: (x * 2 + x[i].sum(), i + 4, b * 2),
        lambda x, i, b: (jnp.flip(x) * 2 + x[i].sum(), i + 3, b * 2),
        lambda x, i, b: (x * 2 + x[i].sum(), i + 3, jnp.where(jnp.arange(40) == 30, jnp.nan, b * 2).astype(b.dtype)),
        lambda x, i, b: (x * 2 + x[i].sum() + jnp.where(jnp.arange(40) == 39, 0.3, 0.0), i + 3, b * 2),
    ],
)
def test_a_changed_result_is_told(expected, changed):
    assert len(probe.differences(expected, run(changed, [F, I8, BF]))) == 1


def test_rounding_is_within_the_tolerance(expected):
    """Another CPU of the same target may add in another order."""
    near = run(lambda x, i, b: (x * (2 + 1e-6) + x[i].sum(), i + 3, b * 2), [F, I8, BF])
    assert near != expected
    assert probe.differences(expected, near) == []


def test_another_number_of_results_is_a_difference(expected):
    assert probe.differences(expected, expected[:2]) == ["2 results instead of 3"]


def test_values_that_are_not_finite_are_counted_and_kept_out_of_the_summary():
    broken = probe._summary(np.array([1.0, np.nan, np.inf, 2.0], np.float32))
    assert broken == {"finite": 2, "first": [1.0, 0.0, 0.0, 2.0], "mean": 0.75, "norm": pytest.approx(5**0.5)}
    zeros = copy.deepcopy(broken) | {"finite": 4}
    assert probe.differences([zeros], [broken])
    assert probe._summary(np.zeros((0, 3), np.float32)) == {"finite": 0, "first": [], "mean": 0.0, "norm": 0.0}


def test_only_small_executables_are_probed():
    assert probe.fits([TensorType("float32", (16 << 20,))])
    assert not probe.fits([TensorType("float32", (16 << 20,)), TensorType("bool", (1,))])
