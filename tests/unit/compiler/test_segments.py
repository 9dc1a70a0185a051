"""Which executables a module is cut into, how graphs call them, and whose memory a call may take over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from max.compiler import Graph, TensorType, merge, segments, xla_lowering
from max.compiler.segments import Call, Plan, Segments, extract, split

F4 = TensorType("float32", (4,))


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = name
    return jax.jit(call)


INC = named("inc", lambda x: jnp.sin(x) + 1)
ADD = named("add", lambda a, b: a + b * 2)
PAIR = named("pair", lambda a, b: (a + b, a - b))


def planned(forward: Callable[..., Any], *, use_subgraphs: bool = True, **types: Any) -> Segments:
    """The segments of one graph g; arguments are numbered weights, state, inputs."""
    return module_segments({"g": Graph("g", forward, **types)}, use_subgraphs=use_subgraphs)[1]


def module_segments(
    graphs: dict[str, Graph], *, use_subgraphs: bool = True, whole: Sequence[str] = ()
) -> tuple[Any, Segments]:
    module = merge.merge("m", {name: xla_lowering.lower(graph, "cpu").stablehlo for name, graph in graphs.items()})
    donated = {
        name: [i for i, argument in enumerate(graph.arguments) if argument.role == "state"]
        for name, graph in graphs.items()
    }
    return module, split(module, donated, use_subgraphs=use_subgraphs, whole=whole)


def test_calls_alone_become_a_plan_over_distinct_functions():
    found = planned(lambda x, y: ADD(INC(INC(x)), y), input_types=[F4, F4])
    assert found.plans == {
        "g": Plan((Call("inc", (0,), (2,)), Call("inc", (2,), (3,)), Call("add", (3, 1), (4,))), (4,))
    }
    assert found.aliases.keys() == {"inc", "add"}


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: INC(x) + 1,
        lambda x: x + 1,
        lambda x: INC(jnp.zeros(4)),
        lambda x: x,
        lambda x: (INC(x), x),
        lambda x: (INC(x),) * 2,
    ],
)
def test_anything_else_is_one_executable(forward):
    found = planned(forward, input_types=[F4])
    assert list(found.aliases) == ["g"]
    assert [call.executable for call in found.plans["g"].calls] == ["g"]
    assert found.plans["g"].outputs == found.plans["g"].calls[0].results


def test_subgraphs_can_be_switched_off():
    found = planned(lambda x: INC(INC(x)), input_types=[F4], use_subgraphs=False)
    assert found.plans == {"g": Plan((Call("g", (0,), (1,)),), (1,))}


def test_a_graph_may_ask_to_be_whole():
    graphs = {name: Graph(name, lambda x: INC(INC(x)), [F4]) for name in ("one", "two")}
    _, found = module_segments(graphs, whole=["two"])
    assert [call.executable for call in found.plans["one"].calls] == ["inc", "inc"]
    assert found.plans["two"] == Plan((Call("two", (0,), (1,)),), (1,))
    assert found.aliases.keys() == {"inc", "two"}


def test_graphs_share_executables():
    graphs = {
        "one": Graph("one", lambda x: INC(x), [F4]),
        "two": Graph("two", lambda x: INC(INC(x)), [F4]),
        "whole": Graph("whole", lambda x: INC(x) * 2, [F4]),
    }
    _, found = module_segments(graphs)
    assert found.aliases.keys() == {"inc", "whole"}
    assert [call.executable for call in found.plans["two"].calls] == ["inc", "inc"]


def test_a_whole_graph_donates_each_state_to_its_successor():
    def forward(weights, state, x):
        return (x, x * 2), {"s": state["s"] + x, "t": state["t"] - weights["w"]}

    found = planned(forward, input_types=[F4], weights={"w": F4}, state={"s": F4, "t": F4})
    # Arguments: w, s, t, x. Results: two outputs, then s and t.
    assert found.aliases == {"g": ((1, 2), (2, 3))}


def test_state_passes_to_its_own_heir_alone():
    """Both results of the call have the state's type; the second is the new state."""

    def forward(weights, state, x):
        y, new = PAIR(state["s"], x)
        return INC(y), {"s": new}

    found = planned(forward, input_types=[F4], state={"s": F4})
    assert found.aliases["pair"] == ((0, 1),)


def test_state_whose_heir_is_made_elsewhere_is_not_donated():
    def forward(weights, state, x):
        return ADD(state["s"], x), {"s": INC(x)}

    found = planned(forward, input_types=[F4], state={"s": F4})
    assert found.aliases == {"add": (), "inc": ()}


def test_state_that_is_read_again_is_not_donated():
    def forward(weights, state, x):
        new = ADD(state["s"], x)
        return PAIR(state["s"], new)[0], {"s": new}

    found = planned(forward, input_types=[F4], state={"s": F4})
    assert found.aliases["add"] == ()


def test_inputs_and_weights_are_never_donated():
    found = planned(lambda weights, state, x: (ADD(weights["w"], x), {}), input_types=[F4], weights={"w": F4})
    assert found.aliases == {"add": ()}


def test_an_intermediate_that_is_used_once_gives_its_memory_to_a_result_of_its_type():
    found = planned(lambda x, y: ADD(INC(x), y), input_types=[F4, F4])
    assert found.aliases["add"] == ((0, 0),)
    both = planned(lambda x, y: PAIR(INC(x), ADD(x, y)), input_types=[F4, F4])
    assert both.aliases["pair"] == ((0, 0), (1, 1))
    again = planned(lambda x, y: PAIR(ADD(t := INC(x), y), t), input_types=[F4, F4])
    assert again.aliases == {"inc": (), "add": (), "pair": ((0, 0),)}


def test_a_value_used_twice_in_one_call_is_not_donated():
    found = planned(lambda x: ADD(t := INC(x), t), input_types=[F4])
    assert found.aliases["add"] == ()


def test_types_must_agree():
    widen = named("widen", lambda x: jnp.concatenate([x, x[:1]]))
    found = planned(lambda x: widen(INC(x)), input_types=[F4])
    assert found.aliases["widen"] == ()


def test_an_executable_reuses_only_what_every_call_gives_up():
    """The first call of inc reads the caller's input, the second an intermediate."""
    assert planned(lambda x: INC(INC(x)), input_types=[F4]).aliases["inc"] == ()
    graphs = {"a": Graph("a", lambda x, y: ADD(INC(x), y), [F4, F4]), "b": Graph("b", lambda x, y: ADD(x, y), [F4, F4])}
    assert module_segments(graphs)[1].aliases["add"] == ()


def test_state_that_is_an_output_too_is_one_executable():
    """The next call would donate the memory of an output that somebody holds; XLA makes two tensors of it."""

    def forward(weights, state, x):
        new = ADD(state["s"], INC(x))
        return new, {"s": new}

    found = planned(forward, input_types=[F4], state={"s": F4})
    assert found.aliases == {"g": ((0, 1),)}


def test_extracted_modules_stand_alone_and_carry_the_aliases():
    graph = Graph("g", lambda x, y: ADD(INC(x), y), [F4, F4])
    module, found = module_segments({"g": graph})
    own = extract(module, "add", found.aliases["add"])
    assert own.operation.verify()
    functions = merge.functions_of(own)
    assert list(functions) == ["main"]
    assert "%arg0: tensor<4xf32> {tf.aliasing_output = 0 : i32}, %arg1: tensor<4xf32>)" in str(own)


def test_extracted_modules_bring_what_they_call():
    outer = named("outer", lambda x: INC(x) * 2)
    module, _ = module_segments({"g": Graph("g", lambda x: outer(outer(x)), [F4])})
    assert list(merge.functions_of(extract(module, "outer", ()))) == ["inc", "main"]
    assert list(merge.functions_of(segments.extract(module, "g", ()))) == ["inc", "outer", "main"]
