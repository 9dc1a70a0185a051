"""The plain step graph: what long steps leave out behind the last attention changes neither logits nor pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import numpy as np
import pytest
from flax import nnx

from max.compiler import Module
from max.compiler.limits import Limits
from max.models import llama
from max.models.llama_config import Config
from max.models.rope import Rope
from max.models.text_graphs import StepBuilder

VOCAB, WIDTH, PAGE = 80, 64, 16
CONFIG = Config(VOCAB, WIDTH, 96, 2, 4, 2, 16, 1e-5, 256, Rope(16, 10000.0), attention_bias=True)


def builder(tokens: int) -> StepBuilder:
    limits = Limits(160, 3, PAGE, 24, (tokens,))
    decoder = nnx.eval_shape(lambda: llama.Llama(CONFIG, rngs=nnx.Rngs(0)))
    return StepBuilder(decoder, CONFIG, limits, CONFIG.weights().made_of("float32"))


def parts_of(tokens: int, rows: int) -> dict[str, Any]:
    """The functions that a step calls, by name in order; a block counts once."""
    graph = builder(tokens).add(Module("plain"), tokens, rows)
    shapes = [jax.ShapeDtypeStruct(each.type.shape, each.type.dtype) for each in graph.arguments]
    equations = jax.make_jaxpr(graph.call_flat)(*shapes).eqns
    return {equation.params["name"]: equation.params["jaxpr"].jaxpr for equation in equations}


def products(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all products of two matrices."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.outvars[0].aval.ndim == 2:
            yield equation.outvars[0].aval.shape
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize(("tokens", "rows"), [(128, 1), (256, 3)])
def test_behind_the_last_attention_a_long_step_computes_the_rows_of_logits_alone(tokens: int, rows: int) -> None:
    parts = parts_of(tokens, rows)
    assert list(parts) == [f"embed_t{tokens}", f"block_t{tokens}", f"last_t{tokens}_r{rows}"]
    assert list(products(parts[f"block_t{tokens}"])) == [(tokens, 128), *[(tokens, n) for n in (64, 192, 64)]]
    last = [(tokens, 128), *[(rows, n) for n in (64, 192, 64, VOCAB)]]
    assert list(products(parts[f"last_t{tokens}_r{rows}"])) == last


@pytest.mark.parametrize(("tokens", "rows"), [(3, 3), (16, 1), (128, 128)])
def test_other_steps_have_one_block_and_a_head(tokens: int, rows: int) -> None:
    assert list(parts_of(tokens, rows)) == [f"embed_t{tokens}", f"block_t{tokens}", f"head_t{tokens}_r{rows}"]


def test_logits_and_pages_are_those_of_a_step_that_computes_all_rows() -> None:
    tokens, wanted = 128, [99, 3, 119]
    steps = builder(tokens)
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(len(type.shape) == 1, 0.3, type.shape).astype("f") for name, type in
               steps.weights.items()}  # fmt: skip
    state = {name: np.zeros(type.shape, type.dtype) for name, type in steps.state.items()}
    rows = np.array([0] * 100 + [2] * 20 + [-1] * 8, np.int32)  # two prompts, and padding
    positions = np.concatenate([np.arange(100), np.arange(20), np.zeros(8)]).astype(np.int32)
    table = np.zeros((3, 10), np.int32)
    table[0, :7], table[2, :2] = np.arange(7, 0, -1), (9, 12)
    given = {
        "tokens": rng.integers(VOCAB, size=tokens, dtype=np.int32),
        "token_src": np.full(tokens, -1, np.int32),
        "prev_ids": np.zeros(3, np.int32),
        "positions": positions,
        "rows": rows,
        "slots": np.where(rows < 0, 0, table[rows, positions // PAGE] * PAGE + positions % PAGE).astype(np.int32),
        "page_table": table,
        "lengths": np.array([100, 0, 20], np.int32),
    }
    results = []
    for chosen in (np.array(wanted, np.int32), np.arange(tokens, dtype=np.int32)):
        graph = steps.add(Module(f"{len(chosen)} rows"), tokens, len(chosen))
        values = {**given, "logit_rows": chosen}
        step = jax.jit(graph.forward, compiler_options={"xla_backend_optimization_level": "0"})
        results.append(step(weights, state, *(values[name] for name in graph.inputs)))
    (logits, pages), (all_logits, all_pages) = results
    np.testing.assert_allclose(logits, all_logits[np.array(wanted)], rtol=0, atol=1e-5 * float(np.std(all_logits)))
    assert np.std(all_logits) > 0.1 and set(pages) == {"pages.0", "pages.1"}
    for name, page in pages.items():
        written = np.asarray(page)
        assert written[[*range(1, 8), 9, 12]].any(axis=(1, 2, 3, 4)).all()
        np.testing.assert_allclose(written, all_pages[name], rtol=0, atol=1e-6 * written.std())
