"""The Llama module, under a dense attention written here, answers as transformers did (references/llama_*.npz)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from seeded import seeded_checkpoint

from max.models.layers import split_heads
from max.models.llama import Llama
from max.models.llama_config import Config
from max.models.rope import rope_tables, rotate

HERE = Path(__file__).parent
CONFIGS = json.loads((HERE / "llama.json").read_text())
# Of the standard deviation of the logits.
TOLERANCE = 1e-4


def load_llama(folder: Path) -> tuple[Config, Llama]:
    """The module with the checkpoint's tensors, each of which is read exactly once."""
    config = Config.from_hf(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    values = {}
    for weight in config.weights().weights:
        sources = []
        for source, shape in weight.source_shapes():
            tensor = tensors.pop(source)
            assert tensor.shape == shape, source
            sources.append(tensor.T if weight.transposed else tensor)
        values[weight.name] = np.concatenate(sources, axis=-1)
    assert not tensors
    definition, params = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    filled = []
    for path, param in nnx.to_flat_state(params):
        value = values.pop(".".join(map(str, path)))
        assert param.shape == value.shape, path
        filled.append((path, param.replace(jnp.asarray(value))))
    assert not values
    return config, nnx.merge(definition, nnx.from_flat_state(filled))


@partial(nnx.jit, static_argnums=0)
def dense_forward(config: Config, model: Llama, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits (T, V) of one row; token t is rotated as when its row had `lengths[t]` tokens, keys keep that rotation."""
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    cos, sin = rope_tables(config.rope, positions, lengths)
    group = config.num_heads // config.num_kv_heads

    def attend(qkv: jax.Array) -> jax.Array:
        q, k, v = split_heads(qkv, config.num_heads, config.num_kv_heads, config.head_dim)
        q, k = rotate(q, cos, sin), jnp.repeat(rotate(k, cos, sin), group, axis=1)
        scores = jnp.einsum("tnh,snh->nts", q, k) * config.head_dim**-0.5
        scores = jnp.where(positions[:, None] >= positions[None, :], scores, -jnp.inf)
        out = jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores, axis=-1), jnp.repeat(v, group, axis=1))
        return out.reshape(len(tokens), -1)

    x = model.embed_tokens(tokens)
    for block in model.blocks:
        x = block(x, attend)
    return model.logits(x)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    seeded_checkpoint(CONFIGS[request.param], folder)
    with np.load(HERE / "references" / f"llama_{request.param}.npz") as reference:
        return *load_llama(folder), dict(reference)


def test_full_forward(case):
    config, model, reference = case
    prompt = reference["prompt"]
    logits = dense_forward(config, model, jnp.asarray(prompt), jnp.full(len(prompt), len(prompt), jnp.int32))
    assert np.abs(logits - reference["logits"]).max() <= TOLERANCE * reference["logits"].std()


def test_greedy_continuation(case):
    """One forward over the whole row stands for the cached decode: each generated token sees its own row length."""
    config, model, reference = case
    prompt, greedy = reference["prompt"], reference["greedy"]
    tokens = np.concatenate([prompt, greedy[:-1]])
    lengths = np.maximum(np.arange(1, len(tokens) + 1), len(prompt)).astype(np.int32)
    logits = np.asarray(dense_forward(config, model, jnp.asarray(tokens), jnp.asarray(lengths)))[len(prompt) - 1 :]
    tolerance = TOLERANCE * reference["logits"].std()
    np.testing.assert_array_equal(logits.argmax(axis=-1), greedy)
    assert np.abs(logits[-1] - reference["last_logits"]).max() <= tolerance
    ranked = np.sort(logits, axis=-1)
    assert np.abs(ranked[:, -1] - ranked[:, -2] - reference["margins"]).max() <= 2 * tolerance
