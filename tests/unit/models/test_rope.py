"""Rotary embeddings: both key styles, refusals, and the numbers of transformers (tests/parity/references/rope.npz)."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from max import ModelError
from max.models.rope import Rope, inverse_frequencies, rope_tables, rotate

PARITY = Path(__file__).parents[2] / "parity"
CASES: dict[str, dict[str, Any]] = json.loads((PARITY / "rope.json").read_text())
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def reference():
    with np.load(PARITY / "references" / "rope.npz") as stored:
        return dict(stored)


def parsed(name: str) -> Rope:
    return Rope.from_hf(CASES[name], CASES[name]["head_dim"])


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_scale_are_those_of_transformers(name, reference):
    rope = parsed(name)
    frequencies = inverse_frequencies(rope)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, reference[f"{name}.inverse_frequencies"], rtol=2.5e-7)
    assert rope.scale == pytest.approx(float(reference[f"{name}.scale"]), rel=1e-12)


def test_dynamic_frequencies_follow_the_row_length(reference):
    rope = parsed("llama2_dynamic")
    lengths = reference["llama2_dynamic.lengths"]
    # At position 1 the angle is the frequency, and below pi it can be read back.
    cos, sin = rope_tables(rope, jnp.ones(len(lengths), jnp.int32), jnp.asarray(lengths))
    angles = np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64))
    np.testing.assert_allclose(angles, reference["llama2_dynamic.by_length"], rtol=1e-6)
    assert not np.allclose(angles[0], angles[-1], rtol=0.1)


def test_every_llama3_band_is_hit():
    """Guards the reference itself: kept, blended and divided frequencies all occur."""
    rope = parsed("llama3.1")
    ratio = inverse_frequencies(Rope(rope.dim, rope.theta)) / inverse_frequencies(rope)
    assert (ratio == 1).any() and np.isclose(ratio, 8).any() and ((ratio > 1.01) & (ratio < 7.9)).any()


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_both_key_styles_say_the_same(kind):
    scaling = {**LLAMA3, kind: "llama3"}
    if kind == "type":
        del scaling["rope_type"]
    older = {"rope_theta": 500000.0, "rope_scaling": scaling, "max_position_embeddings": 131072}
    newer = {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "max_position_embeddings": 131072}
    assert Rope.from_hf(older, 128) == Rope.from_hf(newer, 128)
    assert Rope.from_hf(older, 128) == Rope(128, 500000.0, "llama3", 8.0, 8192, 1.0, 4.0)


@pytest.mark.parametrize("raw", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_no_scaling_is_the_default(raw):
    assert Rope.from_hf(raw, 64) == Rope(64, 10000.0)


def test_rope_scaling_wins_over_rope_parameters():
    raw = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}
    assert Rope.from_hf(raw, 64) == Rope(64, 10000.0, "linear", 2.0)


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "longrope"),
        ({"type": "mrope"}, "mrope"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "dynamic", "factor": None}, "factor is None"),
        ({"rope_type": "yarn"}, "factor is missing"),
        ({"rope_type": "linear", "factor": -2.0}, "factor is -2.0"),
        ({"rope_type": "linear", "factor": "4"}, "factor is '4'"),
        ({"rope_type": "linear", "factor": math.inf}, "factor is inf"),
        ({key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}, "low_freq_factor is missing"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": "8k"}, "original_max_position_embeddings is '8k'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"full_attention": {"rope_type": "default"}}, "flat object"),
        (["linear", 2.0], "flat object"),
    ],
)
def test_refuses_what_it_would_get_wrong(scaling, named):
    with pytest.raises(ModelError, match=named) as refused:
        Rope.from_hf({"rope_scaling": scaling}, 64)
    assert refused.value.hint


def test_refuses_odd_heads():
    with pytest.raises(ModelError, match="head_dim 63"):
        Rope.from_hf({}, 63)


@partial(jax.jit, static_argnums=0)
def score_of(rope: Rope, q: jax.Array, k: jax.Array, positions: jax.Array) -> jax.Array:
    cos, sin = rope_tables(rope, positions, jnp.full(2, 4001, jnp.int32))
    rotated = rotate(jnp.concatenate([q, k]), cos, sin)
    return jnp.vdot(rotated[0], rotated[1])


@settings(max_examples=settings().max_examples // 4)
@given(st.integers(0, 4000), st.integers(0, 4000), st.sampled_from(["llama2", "llama3.2", "yarn_mscale"]))
def test_scores_depend_on_the_distance_only(query_at, key_at, name):
    """The property that rotary embeddings are made for, with the squared factor on cos and sin."""
    rope = parsed(name)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, rope.dim)).astype(np.float32)

    def score(query_position: int, key_position: int) -> float:
        return float(score_of(rope, q, k, np.array([query_position, key_position], np.int32)))

    shift = min(query_at, key_at)
    assert score(query_at, key_at) == pytest.approx(score(query_at - shift, key_at - shift), abs=5e-2)
    assert score(key_at, key_at) == pytest.approx(float(np.vdot(q, k)) * rope.scale**2, abs=2e-3)


def test_rotates_halves_not_neighbours():
    cos, sin = jnp.zeros((1, 2)), jnp.ones((1, 2))
    turned = rotate(jnp.array([[[1.0, 2.0, 3.0, 4.0]]]), cos, sin)
    np.testing.assert_array_equal(np.asarray(turned).ravel(), [-3.0, -4.0, 1.0, 2.0])
