"""Weights as they are exported and read back, and the dense forward pass that evaluation uses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from max.models.builtin.evaluate import loops, most_repeats, pure_params
from max.models.builtin.export import hf_tensors
from max.models.builtin.forward import hidden_states
from max.models.builtin.train import HF_CONFIG, SHORT, TOKENS_PER_STEP, learning_rate
from max.models.llama import Llama
from max.models.llama_config import Config

CONFIG = Config.from_hf(
    HF_CONFIG
    | {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2}
)


@pytest.fixture(scope="module")
def model() -> Llama:
    return nnx.jit(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))()


def test_exported_tensors_have_hf_shapes_and_come_back(model: Llama) -> None:
    params = nnx.to_pure_dict(nnx.state(model))
    tensors = hf_tensors(CONFIG, params)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (8, 16)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (16, 24)
    expected = {name: shape for weight in CONFIG.weights().weights for name, shape in weight.source_shapes()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    back = pure_params(CONFIG, tensors)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=2**-8)


def test_no_position_sees_a_later_one_nor_another_row(model: Llama) -> None:
    states = nnx.jit(lambda model, tokens: hidden_states(model, CONFIG, tokens).reshape(2, 10, -1))
    tokens = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
    before, after = states(model, tokens), states(model, tokens.at[1, 6].set(31))
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_allclose(before[1, :6], after[1, :6], atol=1e-6)
    assert (np.abs(before[1, 6:] - after[1, 6:]).max(axis=-1) > 1e-5).all()


def test_the_rate_before_the_decay_ignores_the_number_of_steps() -> None:
    short, long = (
        [float(np.asarray(learning_rate(steps)(step))) for step in (700, 800, 999)] for steps in (1000, 4000)
    )
    assert short[0] == long[0] == long[2]
    assert short[2] < short[1] < short[0]
    assert TOKENS_PER_STEP % SHORT == 0


def test_a_loop_is_a_phrase_again_at_once_or_three_times() -> None:
    assert loops("made of a part of the whole part of the whole")
    assert loops("a part of the hand or a part of the foot or a part of the ear")
    assert not loops("a part of the hand or a part of the foot or a part of it")
    assert most_repeats("a part of the hand or a part of the foot") == 2
    assert most_repeats("a part") == 0
