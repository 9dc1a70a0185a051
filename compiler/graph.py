"""What users and architectures describe: graphs of JAX functions, grouped in modules. Tracing happens later."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import CompileError

Role = Literal["weight", "state", "input"]


@dataclass(frozen=True)
class TensorType:
    """A tensor's dtype (a numpy name, e.g. "float32") and shape (static sizes)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+$", self.dtype)
        return math.prod(self.shape) * (int(bits.group()) // 8 if bits else 1)  # "bool" has no digits

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Argument:
    """One argument of a graph: a weight, state that is updated in place, or an input of the call."""

    name: str
    role: Role
    type: TensorType


class Module:
    """Graphs that are compiled together: one MLIR module in which equal subgraphs stand once."""

    def __init__(self, name: str = "module") -> None:
        self.name = name
        self.graphs: dict[str, Graph] = {}

    def add(self, graph: Graph) -> None:
        """Adds a graph under its name; raises CompileError when the name is taken, or for a weight of two types."""
        if graph.name in self.graphs:
            raise CompileError(f"module {self.name} has a graph {graph.name} already", "Give each graph its own name.")
        for other in self.graphs.values():
            for mine, theirs in ((graph.weights, other.weights), (graph.state, other.state)):
                for name in (name for name in mine if mine[name] != theirs.get(name, mine[name])):
                    raise CompileError(
                        f"{name} is {mine[name]} in graph {graph.name} and {theirs[name]} in graph {other.name}",
                        "Graphs of one module share weights and state by name: give it one type, or two names.",
                    )
        self.graphs[graph.name] = graph

    def __repr__(self) -> str:
        return f"Module({self.name!r}, graphs={list(self.graphs)})"


class Graph:
    """One function that can be called at run time.

    forward:     a JAX-traceable function. Without weights and state it takes the inputs and returns an array or a
                 tuple; with either it takes (weights, state, *inputs), dicts by name, and returns (outputs, new state)
    input_types: the inputs' types, or a mapping that names them
    weights:     bound once when the graph is loaded
    state:       updated in place by every call (donated); the new state must have the same names and types
    outputs:     names of the outputs; output0, output1, ... otherwise
    module:      the module to join; a new one otherwise
    is_whole:    one executable even where it is nothing but calls of functions that other graphs call too
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        input_types: Sequence[TensorType] | Mapping[str, TensorType] = (),
        *,
        weights: Mapping[str, TensorType] | None = None,
        state: Mapping[str, TensorType] | None = None,
        outputs: Sequence[str] = (),
        module: Module | None = None,
        is_whole: bool = False,
    ) -> None:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise CompileError(f"a graph cannot be named {name!r}", "Use letters, digits, '_', '-' and '.'.")
        self.name = name
        self.forward = forward
        if not isinstance(input_types, Mapping):
            input_types = {f"input{i}": type for i, type in enumerate(input_types)}
        self.inputs = dict(input_types)
        self.weights = dict(weights or {})
        self.state = dict(state or {})
        self.output_names = tuple(outputs)
        self.is_whole = is_whole
        self.module = module if module is not None else Module(name)
        self.module.add(self)

    @property
    def arguments(self) -> list[Argument]:
        """All arguments in the order of the compiled signature: weights, state, inputs."""
        groups: tuple[tuple[Role, dict[str, TensorType]], ...] = (
            ("weight", self.weights),
            ("state", self.state),
            ("input", self.inputs),
        )
        return [Argument(name, role, type) for role, types in groups for name, type in types.items()]

    def call_flat(self, *flat: Any) -> tuple[Any, ...]:
        """Calls `forward` with arguments in signature order; returns the outputs, then the new state, as one tuple."""
        weights = dict(zip(self.weights, flat, strict=False))
        rest = flat[len(self.weights) :]
        state, inputs = dict(zip(self.state, rest, strict=False)), rest[len(self.state) :]
        if not self.weights and not self.state:
            return _as_tuple(self.forward(*inputs))
        outputs, new_state = self.forward(weights, state, *inputs)
        if list(new_state) != list(self.state):
            raise CompileError(
                f"graph {self.name} returns the state {list(new_state)}, not {list(self.state)}",
                "Return every state tensor under its own name, in the order given.",
            )
        return (*_as_tuple(outputs), *new_state.values())

    def __repr__(self) -> str:
        return f"Graph({self.name!r}, inputs={ {name: str(type) for name, type in self.inputs.items()} })"


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
