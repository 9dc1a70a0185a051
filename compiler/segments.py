"""Stage 4: what is compiled, and how a graph's call is made of it.

XLA inlines every call, so a shared subgraph pays off only when it is an executable of its own that the runtime calls
several times. A graph whose body is nothing but calls becomes a plan over its distinct callees; any other graph, and
one that asks for it, is one executable and a plan of one call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .merge import callee_of, callees_first, functions_of

if TYPE_CHECKING:
    from jaxlib.mlir import ir


@dataclass(frozen=True)
class Call:
    """One call of an executable; values are numbered: the graph's arguments first, then results in order."""

    executable: str
    arguments: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How a graph is executed: its calls in order, and the values that it returns."""

    calls: tuple[Call, ...]
    outputs: tuple[int, ...]


@dataclass
class Segments:
    """The plans of a module's graphs, and for each executable the aliases (argument, result) of donated memory."""

    plans: dict[str, Plan] = field(default_factory=dict)
    aliases: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)


def split(
    module: ir.Module, donated: dict[str, list[int]], *, use_subgraphs: bool, whole: Collection[str] = ()
) -> Segments:
    """Plans every graph of a merged module.

    donated:       per graph, the arguments whose memory its last outputs (the new state, in this order) take over
    use_subgraphs: False makes every graph one executable; otherwise those named in `whole` are
    """
    segments = Segments()
    candidates: dict[str, set[tuple[int, int]]] = {}
    for name, function in functions_of(module).items():
        if name not in donated:
            continue
        if use_subgraphs and name not in whole and _is_calls(function):
            plan = _plan_calls(function)
            aliases = _aliases(function, plan, donated[name])
        else:
            plan, aliases = _plan_whole(name, function, donated[name])
        segments.plans[name] = plan
        for executable, pairs in aliases:
            # One executable serves many calls: it may only reuse what every one of them gives up.
            candidates[executable] = candidates.get(executable, pairs) & pairs
    segments.aliases = {executable: tuple(sorted(pairs)) for executable, pairs in candidates.items()}
    return segments


def _is_calls(function: ir.Operation) -> bool:
    """Whether a function is calls alone, and each value that it returns is a tensor of its own.

    A state tensor that is returned as an output too would be donated by the next call under its holder's hands; only
    XLA makes two of it.
    """
    block = function.regions[0].blocks[0]
    *body, end = block.operations
    returned = list(end.operation.operands)
    own = len(set(returned)) == len(returned) and not any(value in returned for value in block.arguments)
    return bool(body) and own and all(op.operation.name == "func.call" for op in body)


def _plan_whole(
    name: str, function: ir.Operation, donated: list[int]
) -> tuple[Plan, list[tuple[str, set[tuple[int, int]]]]]:
    block = function.regions[0].blocks[0]
    num_arguments, num_results = len(block.arguments), len(block.operations[-1].operation.operands)
    results = tuple(range(num_arguments, num_arguments + num_results))
    call = Call(name, tuple(range(num_arguments)), results)
    first = num_results - len(donated)
    pairs = {(argument, first + i) for i, argument in enumerate(donated)}
    return Plan((call,), results), [(name, pairs)]


def _plan_calls(function: ir.Operation) -> Plan:
    block = function.regions[0].blocks[0]
    numbers = {value: i for i, value in enumerate(block.arguments)}
    calls = []
    *body, end = block.operations
    for op in body:
        results = tuple(range(len(numbers), len(numbers) + len(op.operation.results)))
        arguments = tuple(numbers[operand] for operand in op.operation.operands)
        calls.append(Call(callee_of(op.operation), arguments, results))
        numbers.update(zip(op.operation.results, results, strict=True))
    return Plan(tuple(calls), tuple(numbers[operand] for operand in end.operation.operands))


def _aliases(function: ir.Operation, plan: Plan, donated: list[int]) -> list[tuple[str, set[tuple[int, int]]]]:
    """Per call, the pairs (argument, result) that may share memory: the argument dies there and the types agree."""
    types = _value_types(function, plan)
    uses = Counter(value for call in plan.calls for value in call.arguments)
    uses.update(plan.outputs)
    num_arguments = len(function.regions[0].blocks[0].arguments)
    # A state tensor must become the state that the graph returns for it, not another result of the same type.
    heirs = dict(zip(donated, plan.outputs[len(plan.outputs) - len(donated) :], strict=True))
    found = []
    for call in plan.calls:
        pairs: set[tuple[int, int]] = set()
        free = [value for value in call.results if value not in heirs.values()]
        for position, value in enumerate(call.arguments):
            if uses[value] != 1 or (value < num_arguments and value not in heirs):
                continue
            if value in heirs:
                heir = heirs[value] if heirs[value] in call.results else None
            else:
                heir = next((result for result in free if types[result] == types[value]), None)
            if heir is not None:
                pairs.add((position, call.results.index(heir)))
                free = [value for value in free if value != heir]
        found.append((call.executable, pairs))
    return found


def _value_types(function: ir.Operation, plan: Plan) -> list[str]:
    block = function.regions[0].blocks[0]
    types = [str(argument.type) for argument in block.arguments]
    for op in list(block.operations)[: len(plan.calls)]:
        types += [str(result.type) for result in op.operation.results]
    return types


def extract(module: ir.Module, executable: str, aliases: tuple[tuple[int, int], ...]) -> ir.Module:
    """One executable's own module: the function as `main` with all that it reaches; aliased arguments are donated."""
    from jaxlib.mlir import ir

    functions = functions_of(module)
    with module.context, ir.Location.unknown():
        own = ir.Module.create()
        own.operation.attributes["sym_name"] = ir.StringAttr.get(executable)
        for name in callees_first(functions, executable, composites=True):
            with ir.InsertionPoint(own.body):
                copy = functions[name].clone()
            if name == executable:
                copy.attributes["sym_name"] = ir.StringAttr.get("main")
                copy.attributes["sym_visibility"] = ir.StringAttr.get("public")
                _donate(copy, dict(aliases))
    return own


def _donate(function: ir.Operation, aliases: dict[int, int]) -> None:
    from jaxlib.mlir import ir

    i32 = ir.IntegerType.get_signless(32)
    rows = []
    for position in range(len(function.regions[0].blocks[0].arguments)):
        row = {}
        if position in aliases:
            row["tf.aliasing_output"] = ir.IntegerAttr.get(i32, aliases[position])
        rows.append(ir.DictAttr.get(row))
    function.attributes["arg_attrs"] = ir.ArrayAttr.get(rows)
