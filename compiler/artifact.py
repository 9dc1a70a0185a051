"""From a module of graphs to a MEF: runs the stages, compiles in parallel, and writes every section."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import CompileError
from ..cache import mef
from . import merge, segments, xla_lowering
from .backends import compile_all
from .code_sections import Code, Types
from .dump import Dump
from .graph import Graph, Module, TensorType
from .targets import Target
from .targets.xla_options import Products
from .xla_compiler import Compiled

if TYPE_CHECKING:
    from jaxlib.mlir import ir

Progress = Callable[[str, str, int, int], None]
"""Called with the phase, the item just finished, and how many of how many are done."""


def _silent(phase: str, item: str, done: int, total: int) -> None:
    pass


@dataclass
class Summary:
    """What a compilation did. Seconds by phase: trace, merge, compile, write."""

    artifact_id: str = ""
    graphs: int = 0
    executables: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Options:
    """How to compile.

    facts:    written into the manifest for the runtime; weights: a WeightTable as JSON
    portable: keep StableHLO without native code; `finish` compiles it where the device is
    autotune, use_vendor_blas: see `Products` in targets/xla_options.py
    """

    use_subgraphs: bool = True
    portable: bool = False
    autotune: Path | None = None
    use_vendor_blas: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] | None = None
    dump: Dump = field(default_factory=Dump)
    progress: Progress = _silent

    @property
    def products(self) -> Products:
        """How matrices are multiplied; `weights` say what they are made of."""
        rows = (self.weights or {}).get("weights") or [{}]
        return Products(rows[0].get("element", "float32"), self.autotune, self.use_vendor_blas)


def compile_module(module: Module, target: Target, writer: mef.MefWriter, options: Options | None = None) -> Summary:
    """Compiles all graphs of a module for a target and writes the artifact; raises CompileError."""
    return Compilation(module, target, options).run(writer)


def compile_with_progress(sources: dict[str, bytes], target: Target, options: Options) -> dict[str, Compiled]:
    """Executables by name, in the order of their sources; says of each when it is there."""
    compiled: dict[str, Compiled] = {}
    for name, executable in compile_all(sources, target, options.dump, options.products):
        compiled[name] = executable
        options.progress("compile", name, len(compiled), len(sources))
    return {name: compiled[name] for name in sources}


class Compilation:
    """One run through the stages; each method is a stage and leaves its result for the next."""

    def __init__(self, module: Module, target: Target, options: Options | None = None) -> None:
        self.options = options or Options()
        self.module, self.target, self.dump = module, target, self.options.dump
        self.summary = Summary(graphs=len(module.graphs))
        self.lowered: dict[str, xla_lowering.Lowered] = {}
        self.compiled: dict[str, Compiled] = {}

    @cached_property
    def merged(self) -> ir.Module:
        """Stage 3, by way of the first two; raises CompileError."""
        self._timed("trace", self._lower)
        return self._timed("merge", self._merge)

    def fingerprint(self) -> str:
        """The sha256 of what is computed: the merged StableHLO, without names of files and lines."""
        return hashlib.sha256(xla_lowering.portable_bytecode(self.merged)).hexdigest()

    def run(self, writer: mef.MefWriter) -> Summary:
        """Stages 4 and 5, after those that have not been run, and the artifact; raises CompileError."""
        merged = self.merged
        plan = segments.split(
            merged,
            _donated(self.module),
            use_subgraphs=self.options.use_subgraphs,
            whole=[name for name, graph in self.module.graphs.items() if graph.is_whole],
        )
        self.summary.executables = len(plan.aliases)
        if not self.options.portable:
            self._timed("compile", lambda: self._compile(merged, plan))
        self._timed("write", lambda: self._write(writer, merged, plan))
        self.dump.finish()
        return self.summary

    def _timed[T](self, phase: str, stage: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = stage()
        self.summary.seconds[phase] = time.perf_counter() - started
        return result

    def _lower(self) -> None:
        for done, (name, graph) in enumerate(self.module.graphs.items(), 1):
            started = time.perf_counter()
            self.lowered[name] = xla_lowering.lower(graph, self.target.xla_platform)
            seconds = time.perf_counter() - started
            self.dump.write(name, "1.jaxpr", self.lowered[name].jaxpr, seconds)
            if self.dump.enabled:
                self.dump.write(name, "2.stablehlo.mlir", _text(self.lowered[name].stablehlo), seconds)
            self.options.progress("trace", name, done, len(self.module.graphs))

    def _merge(self) -> ir.Module:
        merged = merge.merge(self.module.name, {name: low.stablehlo for name, low in self.lowered.items()})
        self.dump.write(self.module.name, "3.mlir", str(merged))
        return merged

    def _compile(self, merged: ir.Module, plan: segments.Segments) -> None:
        # MLIR's Python objects are used by this thread only; the workers see bytes, and XLA releases the GIL.
        sources = {
            name: xla_lowering.bytecode(segments.extract(merged, name, aliases))
            for name, aliases in plan.aliases.items()
        }
        self.compiled = compile_with_progress(sources, self.target, self.options)

    def _write(self, writer: mef.MefWriter, merged: ir.Module, plan: segments.Segments) -> None:
        types = _executable_types(merged, plan)
        writer.add_json(mef.MANIFEST, "", self._manifest(plan, types))
        writer.add(mef.MODULE, self.module.name, xla_lowering.portable_bytecode(merged))
        for name, lowered in self.lowered.items():
            writer.add(mef.JAXPR, name, lowered.jaxpr.encode())
        signatures = {
            name: {"arguments": _json_types(arguments), "results": _json_types(results), "aliases": plan.aliases[name]}
            for name, (arguments, results) in types.items()
        }
        writer.add_json(mef.SIGNATURES, "", signatures)
        if self.options.weights is not None:
            writer.add_json(mef.WEIGHTS, "", self.options.weights)
        writer.add_json(mef.CUSTOM_CALLS, "", sorted(set(re.findall(r"custom_call @([\w.$-]+)", str(merged)))))
        code = Code(self.target, self.compiled, types, self.summary.seconds, self.options.products)
        code.write(writer)
        self.summary.artifact_id = writer.finish()

    def _manifest(self, plan: segments.Segments, types: dict[str, Types]) -> dict[str, Any]:
        graphs = {}
        for name, graph in self.module.graphs.items():
            steps = plan.plans[name]
            values = [str(argument.type) for argument in graph.arguments]
            for call in steps.calls:
                values += [str(type) for type in types[call.executable][1]]
            outputs = [_parse_type(values[value]) for value in steps.outputs[: len(steps.outputs) - len(graph.state)]]
            graphs[name] = {
                "arguments": [
                    {"name": argument.name, "role": argument.role, **_json_types([argument.type])[0]}
                    for argument in graph.arguments
                ],
                "outputs": [{"name": _output_name(graph, i), **row} for i, row in enumerate(_json_types(outputs))],
                "calls": [[call.executable, list(call.arguments), list(call.results)] for call in steps.calls],
                "returns": list(steps.outputs),
            }
        return {"name": self.module.name, "target": self.target.name, "graphs": graphs, "facts": self.options.facts}


def _donated(module: Module) -> dict[str, list[int]]:
    return {
        name: [i for i, argument in enumerate(graph.arguments) if argument.role == "state"]
        for name, graph in module.graphs.items()
    }


def _executable_types(merged: ir.Module, plan: segments.Segments) -> dict[str, Types]:
    """Argument and result types of every executable, from the functions' MLIR types."""
    found = {}
    for name, function in merge.functions_of(merged).items():
        if name in plan.aliases:
            block = function.regions[0].blocks[0]
            results = [operand.type for operand in block.operations[-1].operation.operands]
            found[name] = (
                [_mlir_type(argument.type) for argument in block.arguments],
                [_mlir_type(type) for type in results],
            )
    return found


_DTYPES = {"f": "float", "i": "int", "ui": "uint", "bf": "bfloat"}


def _mlir_type(type: ir.Type) -> TensorType:
    """`tensor<4x8xf32>` as TensorType("float32", (4, 8))."""
    found = re.fullmatch(r"tensor<((?:\d+x)*)(f|i|ui|bf)(\d+)>", str(type))
    if found is None:
        raise CompileError(f"a graph has a value of type {type}", "Use tensors of floats, integers and booleans.")
    shape, kind, bits = found.groups()
    dtype = "bool" if (kind, bits) == ("i", "1") else f"{_DTYPES[kind]}{bits}"
    return TensorType(dtype, tuple(map(int, shape.split("x")[:-1])))


def _parse_type(text: str) -> TensorType:
    dtype, _, shape = text.rstrip("]").partition("[")
    return TensorType(dtype, tuple(int(size) for size in shape.split(",") if size))


def _json_types(types: list[TensorType]) -> list[dict[str, Any]]:
    return [{"dtype": type.dtype, "shape": list(type.shape)} for type in types]


def _output_name(graph: Graph, index: int) -> str:
    return graph.output_names[index] if index < len(graph.output_names) else f"output{index}"


def _text(bytecode: bytes) -> str:
    from jaxlib.mlir import ir

    with xla_lowering.mlir_context():
        return str(ir.Module.parse(bytecode))
