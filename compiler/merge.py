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
from . import xla

if TYPE_CHECKING:
    from jaxlib.mlir import ir

# Locations name source files and lines: they would make equal graphs differ and grow the artifact.
PASSES = "builtin.module(strip-debuginfo,canonicalize,cse,symbol-dce)"

_CALLEE = re.compile(r"(?<![\w\"])@([\w.$-]+)")


def merge(name: str, graphs: dict[str, bytes]) -> ir.Module:
    """Joins graphs (StableHLO bytecode by name) into one verified module with a public function per graph."""
    from jaxlib.mlir import ir

    context = xla.mlir_context()
    with context, ir.Location.unknown():
        merged = ir.Module.create()
        merged.operation.attributes["sym_name"] = ir.StringAttr.get(name)
        known: dict[str, str] = {}  # hash of a private function -> its name in the merged module
        taken = set(graphs)
        for graph, bytecode in graphs.items():
            source = ir.Module.parse(bytecode)
            run_passes(source)
            _add_graph(merged, source, graph, known, taken)
        run_passes(merged)
        if not merged.operation.verify():
            raise CompileError(f"module {name} does not verify after merging", "This is a defect of the compiler.")
    return merged


def run_passes(module: ir.Module) -> None:
    """Runs the pass pipeline in place."""
    from jaxlib.mlir.passmanager import PassManager

    PassManager.parse(PASSES, context=module.context).run(module.operation)


def _add_graph(merged: ir.Module, source: ir.Module, graph: str, known: dict[str, str], taken: set[str]) -> None:
    functions = {symbol_name(op): op for op in source.body.operations}
    names: dict[str, str] = {}  # name in the source -> name in the merged module
    hashes: dict[str, str] = {}
    for name in callees_first(functions, "main"):
        if name == "main":
            continue
        digest = _hash(functions[name], name, hashes)
        hashes[name] = digest
        if digest in known:
            names[name] = known[digest]
            continue
        names[name] = known[digest] = _free_name(name, taken)
        _copy(merged, functions[name], names[name], names, public=False)
    _copy(merged, functions["main"], graph, names, public=True)


def callees_first(functions: dict[str, ir.Operation], root: str) -> Iterator[str]:
    """The functions that `root` reaches, each after all that it calls; `root` is the last."""
    done: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        done.add(name)
        for callee in called(functions[name]):
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


def callee_of(call: ir.Operation) -> str:
    from jaxlib.mlir import ir

    return ir.FlatSymbolRefAttr(call.attributes["callee"]).value


def symbol_name(function: ir.Operation) -> str:
    from jaxlib.mlir import ir

    return ir.StringAttr(function.operation.attributes["sym_name"]).value


def _walk(op: ir.Operation) -> Iterator[ir.Operation]:
    for region in op.operation.regions:
        for block in region:
            for inner in block.operations:
                yield inner.operation
                yield from _walk(inner)


def _hash(function: ir.Operation, name: str, hashes: dict[str, str]) -> str:
    def stable(match: re.Match[str]) -> str:
        callee = match.group(1)
        return "@self" if callee == name else f"@{hashes.get(callee, callee)}"

    return hashlib.sha256(_CALLEE.sub(stable, str(function.operation)).encode()).hexdigest()


def _free_name(name: str, taken: set[str]) -> str:
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def _copy(merged: ir.Module, function: ir.Operation, name: str, names: dict[str, str], *, public: bool) -> None:
    from jaxlib.mlir import ir

    with ir.InsertionPoint(merged.body):
        copy = function.operation.clone()
    copy.attributes["sym_name"] = ir.StringAttr.get(name)
    copy.attributes["sym_visibility"] = ir.StringAttr.get("public" if public else "private")
    for op in _walk(copy):
        if op.name == "func.call":
            op.attributes["callee"] = ir.FlatSymbolRefAttr.get(names[callee_of(op)])
