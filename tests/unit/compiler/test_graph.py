"""Graphs and modules before tracing: types, the order of arguments, and what they refuse."""

from __future__ import annotations

import pytest

from max import CompileError
from max.compiler import Graph, Module, TensorType


@pytest.mark.parametrize(
    ("type", "nbytes", "text"),
    [
        (TensorType("float32", (2, 3)), 24, "float32[2,3]"),
        (TensorType("bfloat16", (5,)), 10, "bfloat16[5]"),
        (TensorType("bool", (7,)), 7, "bool[7]"),
        (TensorType("uint8", ()), 1, "uint8[]"),
        (TensorType("int64", (0, 4)), 0, "int64[0,4]"),
    ],
)
def test_tensor_types(type, nbytes, text):
    assert (type.nbytes, str(type)) == (nbytes, text)


F4, I2 = TensorType("float32", (4,)), TensorType("int32", (2,))


def test_arguments_are_weights_then_state_then_inputs():
    graph = Graph("g", lambda *_: None, {"x": I2}, weights={"w": F4, "v": I2}, state={"s": F4})
    assert [(argument.name, argument.role, argument.type) for argument in graph.arguments] == [
        ("w", "weight", F4),
        ("v", "weight", I2),
        ("s", "state", F4),
        ("x", "input", I2),
    ]


def test_inputs_without_names_are_numbered():
    assert list(Graph("g", lambda *_: None, [F4, I2]).inputs) == ["input0", "input1"]


def test_plain_functions_take_inputs_only():
    assert Graph("g", lambda x, y: x + y, [F4, F4]).call_flat(1, 2) == (3,)
    assert Graph("g", lambda x: [x, -x], [F4]).call_flat(2) == (2, -2)


def test_functions_with_weights_or_state_take_dicts_by_name():
    def forward(weights, state, x, y):
        return weights["w"] + x, {"s": state["s"] + y, "t": state["t"]}

    graph = Graph("g", forward, [F4, F4], weights={"w": F4}, state={"s": F4, "t": F4})
    assert graph.call_flat(1, 20, 30, 100, 1000) == (101, 1020, 30)
    assert Graph("h", lambda weights, state: (weights["w"], {}), weights={"w": F4}).call_flat(5) == (5,)


def test_state_must_come_back_under_its_names():
    graph = Graph("g", lambda weights, state, x: (x, {"t": x}), [F4], state={"s": F4})
    with pytest.raises(CompileError, match=r"graph g returns the state \['t'\], not \['s'\]"):
        graph.call_flat(1, 2)


def test_a_graph_is_in_its_module():
    module = Module("m")
    first, second = Graph("a", lambda: None, module=module), Graph("b", lambda: None, module=module)
    assert module.graphs == {"a": first, "b": second}
    assert Graph("alone", lambda: None).module.name == "alone"


def test_names_are_unique_in_a_module():
    module = Module("m")
    Graph("a", lambda: None, module=module)
    with pytest.raises(CompileError, match="has a graph a already"):
        Graph("a", lambda: None, module=module)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", "@a", '"a"', "-a"])
def test_names_must_do_for_symbols_and_files(name):
    with pytest.raises(CompileError, match="cannot be named"):
        Graph(name, lambda: None)


@pytest.mark.parametrize("role", ["weights", "state"])
def test_shared_tensors_have_one_type(role):
    """Graphs of a module share weights and state by name, and PJRT would take one for the other of the same size."""
    module = Module("m")

    def add(name: str, tensors: dict[str, TensorType]) -> None:
        weights, state = (tensors, None) if role == "weights" else (None, tensors)
        Graph(name, lambda: None, weights=weights, state=state, module=module)

    add("a", {"x": F4, "own": I2})
    add("b", {"x": F4})
    with pytest.raises(CompileError, match=r"x is int32\[4\] in graph c and float32\[4\] in graph a"):
        add("c", {"x": TensorType("int32", (4,))})
    assert list(module.graphs) == ["a", "b"]
