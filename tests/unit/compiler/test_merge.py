"""Equal functions meet once whatever they are called, different ones stay apart, and the result verifies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from max import CompileError
from max.compiler import Graph, TensorType, merge, xla_lowering

F4 = TensorType("float32", (4,))


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function jitted under a name, so that it is lowered to a private function of that name."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = name
    return jax.jit(call)


def merged(**graphs: Callable[..., Any]) -> Any:
    """The merged module of functions of one float32[4]."""
    lowered = {name: xla_lowering.lower(Graph(name, forward, [F4]), "cpu") for name, forward in graphs.items()}
    return merge.merge("joined", {name: stages.stablehlo for name, stages in lowered.items()})


def visibility(module: Any) -> dict[str, str]:
    found = re.findall(r"func\.func (public|private) @([\w.-]+)\(", str(module))
    return {name: kind for kind, name in found}


def called(module: Any, name: str) -> list[str]:
    return merge.called(merge.functions_of(module)[name])


def test_every_graph_is_a_public_function_of_its_name():
    module = merged(first=lambda x: x + 1, second=lambda x: x * 2)
    assert visibility(module) == {"first": "public", "second": "public"}
    assert module.operation.verify()
    assert "@joined" in str(module)


def test_equal_functions_of_different_names_meet():
    module = merged(
        a=lambda x: named("scale", lambda y: jnp.sin(y) * 2)(x),
        b=lambda x: named("other", lambda y: jnp.sin(y) * 2)(x),
    )
    assert visibility(module) == {"scale": "private", "a": "public", "b": "public"}
    assert called(module, "b") == ["scale"]


def test_different_functions_of_one_name_stay():
    module = merged(
        a=lambda x: named("scale", lambda y: jnp.sin(y) * 2)(x),
        b=lambda x: named("scale", lambda y: jnp.sin(y) * 3)(x),
    )
    assert visibility(module) == {"scale": "private", "scale_1": "private", "a": "public", "b": "public"}
    assert (called(module, "a"), called(module, "b")) == (["scale"], ["scale_1"])


@pytest.mark.parametrize("name", ["inner", "<lambda>"])
def test_callers_of_different_functions_stay_apart(name):
    """The callers' texts are equal: what they call differs, even where MLIR has to quote its name."""

    def graph(factor: float) -> Callable[..., Any]:
        inner = named(name, lambda y: jnp.sin(y) * factor)
        return lambda x: named("outer", lambda y: inner(y) + 1)(x)

    module = merged(a=graph(2.0), b=graph(3.0))
    assert called(module, "a") == ["outer"]
    assert called(module, "b") == ["outer_1"]
    assert called(module, "outer") != called(module, "outer_1")


def test_equal_call_trees_of_different_names_meet_once():
    def graph(prefix: str) -> Callable[..., Any]:
        leaf = named(f"{prefix}_leaf", jnp.cos)
        middle = named(f"{prefix}_middle", lambda y: leaf(leaf(y)) * 2)
        return lambda x: middle(leaf(x))

    module = merged(a=graph("p"), b=graph("q"))
    assert visibility(module) == {"p_leaf": "private", "p_middle": "private", "a": "public", "b": "public"}
    assert called(module, "b") == ["p_leaf", "p_middle"]


def test_a_function_may_not_take_the_name_of_a_graph():
    module = merged(a=lambda x: named("b", jnp.cos)(x), b=lambda x: named("b", jnp.sin)(x))
    assert visibility(module) == {"b_1": "private", "b_2": "private", "a": "public", "b": "public"}


def test_names_do_for_files():
    names = visibility(merged(a=lambda x: jax.jit(lambda y: y + 1)(x)))
    assert names == {"_lambda_": "private", "a": "public"}


def test_other_types_are_other_functions():
    graphs = {
        "a": Graph("a", lambda x: named("f", lambda y: y + 1)(x), [F4]),
        "b": Graph("b", lambda x: named("f", lambda y: y + 1)(x), [TensorType("float32", (5,))]),
    }
    module = merge.merge("m", {name: xla_lowering.lower(graph, "cpu").stablehlo for name, graph in graphs.items()})
    assert visibility(module).keys() == {"f", "f_1", "a", "b"}


def test_what_locations_say_is_dropped():
    module = merged(a=lambda x: named("f", jnp.sin)(x) + 1)
    assert "test_merge" not in module.operation.get_asm(enable_debug_info=True)


def test_callees_come_first_and_the_root_last():
    leaf = named("leaf", jnp.cos)
    module = merged(a=lambda x: leaf(named("middle", lambda y: leaf(y) + 1)(x)))
    assert list(merge.callees_first(merge.functions_of(module), "a")) == ["leaf", "middle", "a"]


def test_the_text_is_the_same_every_time():
    def graph(x):
        return named("f", lambda y: jnp.where(y > 0, jnp.sin(y), y))(x) + 1

    assert str(merged(a=graph, b=graph)) == str(merged(a=graph, b=graph))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: (jax.debug.print("{x}", x=x), x)[1],
        lambda x: jax.lax.composite(lambda y: y + 1, name="my.op")(x),
    ],
)
def test_graphs_that_cannot_be_joined_are_named(forward):
    with pytest.raises(CompileError, match="graph odd cannot join its module"):
        merged(odd=forward)
