"""Stage 3: the graphs of a module as one MLIR module, in which equal subgraphs stand once.

Every graph arrives with a public `main` and private functions. Functions are hashed from the leaves of the call graph
upwards (a callee counts by its hash, not by its name), so that equal ones meet whatever they were called.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .. import CompileError
from . import xla_lowering

if TYPE_CHECKING:
    from jaxlib.mlir import ir

# Locations name source files and lines: they would make equal graphs differ and grow the artifact.
PASSES = "builtin.module(strip-debuginfo,canonicalize,cse,symbol-dce)"


def merge(name: str, graphs: dict[str, bytes]) -> ir.Module:
    """Joins graphs (StableHLO bytecode by name) into one verified module with a public function per graph.

    Raises CompileError for a graph that refers to functions otherwise than by calls, as callbacks and composites do.
    """
    from jaxlib.mlir import ir

    context = xla_lowering.mlir_context()
    with context, ir.Location.unknown():
        merged = ir.Module.create()
        merged.operation.attributes["sym_name"] = ir.StringAttr.get(name)
        known: dict[str, str] = {}  # hash of a private function -> its name in the merged module
        taken = set(graphs)
        for graph, bytecode in graphs.items():
            source = ir.Module.parse(bytecode)
            run_passes(source, graph)
            _add_graph(merged, source, graph, known, taken)
            _verify(merged, graph)
        run_passes(merged, name)
    return merged


def run_passes(module: ir.Module, name: str) -> None:
    """Runs the pass pipeline in place; raises CompileError naming the graph or module."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.passmanager import PassManager

    try:
        PassManager.parse(PASSES, context=module.context).run(module.operation)
    except ir.MLIRError as error:
        raise CompileError(f"{name} does not pass {PASSES}: {error}", "This is a defect of the compiler.") from error


def _verify(merged: ir.Module, graph: str) -> None:
    from jaxlib.mlir import ir

    try:
        merged.operation.verify()
    except ir.MLIRError as error:
        raise CompileError(
            f"graph {graph} cannot join its module: {error}", "Leave out callbacks, debug prints and composites."
        ) from error


def _add_graph(merged: ir.Module, source: ir.Module, graph: str, known: dict[str, str], taken: set[str]) -> None:
    functions = functions_of(source)
    names: dict[str, str] = {}  # name in the source -> name in the merged module
    hashes: dict[str, str] = {}
    for name in callees_first(functions, "main"):
        if name == "main":
            continue
        digest = hashes[name] = _hash(functions[name], hashes)
        if digest in known:
            names[name] = known[digest]
            continue
        names[name] = known[digest] = _free_name(name, taken)
        _copy(merged, functions[name], names[name], names, public=False)
    _copy(merged, functions["main"], graph, names, public=True)


def callees_first(functions: dict[str, ir.Operation], root: str, *, composites: bool = False) -> Iterator[str]:
    """The functions that `root` reaches, each after all that it calls; `root` is the last.

    composites: count what an operation of another dialect stands for as called, as portable bytecode holds those
    """
    done: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        done.add(name)
        for callee in [*called(functions[name]), *(_decompositions(functions[name]) if composites else ())]:
            if callee not in done:
                yield from visit(callee)
        yield name

    yield from visit(root)


def called(function: ir.Operation) -> list[str]:
    """The names of the functions that this one calls, in the order of their first call."""
    found: dict[str, None] = {}
    for op in _walk(function):
        if op.name == "func.call":
            found.setdefault(callee_of(op))
    return list(found)


def _decompositions(function: ir.Operation) -> Iterator[str]:
    from jaxlib.mlir import ir

    for op in _walk(function):
        if op.name == "stablehlo.composite":
            yield ir.FlatSymbolRefAttr(op.attributes["decomposition"]).value


def callee_of(call: ir.Operation) -> str:
    from jaxlib.mlir import ir

    return ir.FlatSymbolRefAttr(call.attributes["callee"]).value


def functions_of(module: ir.Module) -> dict[str, ir.Operation]:
    """A module's functions by name, in their order."""
    from jaxlib.mlir import ir

    operations = [op.operation for op in module.body.operations]
    return {ir.StringAttr(op.attributes["sym_name"]).value: op for op in operations}


def _walk(op: ir.Operation) -> Iterator[ir.Operation]:
    for region in op.regions:
        for block in region:
            for inner in block.operations:
                yield inner.operation
                yield from _walk(inner.operation)


def _hash(function: ir.Operation, hashes: dict[str, str]) -> str:
    """The hash of a function's text with its own name left out and callees named by their hashes."""
    copy = function.clone()
    _rename(copy, "self", hashes)
    return hashlib.sha256(str(copy).encode()).hexdigest()


def _free_name(name: str, taken: set[str]) -> str:
    """A name that is not taken yet, fit for a file's name too: jax calls a function `<lambda>`."""
    name = re.sub(r"[^\w.-]", "_", name)
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def _copy(merged: ir.Module, function: ir.Operation, name: str, names: dict[str, str], *, public: bool) -> None:
    from jaxlib.mlir import ir

    with ir.InsertionPoint(merged.body):
        copy = function.clone()
    copy.attributes["sym_visibility"] = ir.StringAttr.get("public" if public else "private")
    _rename(copy, name, names)


def _rename(function: ir.Operation, name: str, callees: dict[str, str]) -> None:
    from jaxlib.mlir import ir

    function.attributes["sym_name"] = ir.StringAttr.get(name)
    for op in _walk(function):
        if op.name == "func.call":
            op.attributes["callee"] = ir.FlatSymbolRefAttr.get(callees[callee_of(op)])
