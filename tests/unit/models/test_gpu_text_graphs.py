"""The step graph for GPUs, its kernels interpreted, against the plain one: the same logits from the same weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from max.compiler import Graph, Module
from max.compiler.limits import Limits
from max.compiler.weights import Element
from max.models import llama
from max.models.gpu_text_graphs import GpuStepBuilder
from max.models.llama_config import Config
from max.models.rope import Rope
from max.models.text_graphs import StepBuilder

CONFIG = Config(64, 64, 96, 2, 4, 2, 16, 1e-5, 64, Rope(16, 10000.0), attention_bias=True)
TOKENS, PAGE = 8, 4


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    """The weights, in float32 and as the plain graph takes them."""
    rng = np.random.default_rng(0)
    return {weight.name: _random(rng, weight.shape) for weight in CONFIG.weights().made_of("float32").weights}


@pytest.fixture(scope="module")
def wanted(values: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The logits of the plain graph in float32."""
    limits, table = _limits("float32"), CONFIG.weights().made_of("float32")
    graph = StepBuilder(_decoder(), CONFIG, limits, table).add(Module("plain"), TOKENS, 2)
    return _logits(graph, values, limits)


@pytest.mark.quick(element=["float32"])
@pytest.mark.parametrize(("element", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_it_gives_the_logits_of_the_plain_graph(
    element: Element, tolerance: float, values: dict[str, np.ndarray], wanted: list[np.ndarray]
) -> None:
    limits, table = _limits(element), CONFIG.weights().made_of(element).by_output()
    weights = {
        each.name: jnp.asarray(values[each.name].T if each.by_output else values[each.name], element)
        for each in table.weights
    }
    graph = GpuStepBuilder(_decoder(), CONFIG, limits, table).add(Module("gpu"), TOKENS, 2)
    for want, have in zip(wanted, _logits(graph, weights, limits), strict=True):
        assert np.abs(want - have).max() <= tolerance * want.std()


def _limits(page_format: Element) -> Limits:
    return Limits(16, 3, PAGE, 12, (TOKENS,), page_format)


def _decoder() -> llama.Llama:
    return nnx.eval_shape(lambda: llama.Llama(CONFIG, rngs=nnx.Rngs(0)))


def _logits(graph: Graph, weights: Any, limits: Limits) -> list[np.ndarray]:
    """What each step gives, the second with the state that the first has left."""
    state = {name: jnp.zeros(type.shape, type.dtype) for name, type in graph.state.items()}
    step = jax.jit(graph.forward, compiler_options={"xla_backend_optimization_level": "0"})
    results = []
    for given in _steps(limits):
        logits, state = step(weights, state, *(given[name] for name in graph.inputs))
        results.append(np.asarray(logits, np.float32))
    return results


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (0.3 * rng.standard_normal(shape)).astype(np.float32) + (len(shape) == 1)


def _steps(limits: Limits) -> list[dict[str, np.ndarray]]:
    """A prompt of five tokens in row 0 and a padded step; then its next token beside a prompt of two in row 2."""
    table = np.zeros((limits.max_batch, limits.max_pages), np.int32)
    table[0, :2], table[2, 0] = (3, 7), 5
    return [
        _step(limits, table, [(0, position) for position in range(5)], [4, 0]),
        _step(limits, table, [(0, 5), (2, 0), (2, 1)], [0, 2]),
    ]


def _step(limits: Limits, table: np.ndarray, tokens: list[tuple[int, int]], logit_rows: list[int]) -> dict:
    rows = np.array([row for row, _ in tokens] + [-1] * (TOKENS - len(tokens)), np.int32)
    positions = np.array([at for _, at in tokens] + [0] * (TOKENS - len(tokens)), np.int32)
    lengths = np.zeros(limits.max_batch, np.int32)
    for row, at in tokens:
        lengths[row] = at + 1
    slots = np.where(rows < 0, 0, table[rows, positions // PAGE] * PAGE + positions % PAGE)
    return {
        "tokens": (7 * positions + 3 * rows + 9).astype(np.int32) % 64,
        "token_src": np.full(TOKENS, -1, np.int32),
        "prev_ids": np.zeros(limits.max_batch, np.int32),
        "positions": positions,
        "rows": rows,
        "slots": slots.astype(np.int32),
        "page_table": table,
        "lengths": lengths,
        "logit_rows": np.array(logit_rows, np.int32),
    }
