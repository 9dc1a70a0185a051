"""Stages 1 to 3 of an artifact that was compiled before, dumped from what it holds. Imports no jax."""

from __future__ import annotations

from ..cache import mef
from . import segments, xla_lowering
from .dump import Dump
from .merge import functions_of


def dump_stored_stages(artifact: mef.Mef, dump: Dump) -> None:
    """Writes each graph's jaxpr and StableHLO and the module, as a compilation would; raises CacheError for damage.

    The StableHLO of a graph is taken from the merged module: simplified, and with the names that it has there.
    """
    for section in artifact.sections():
        if section.kind == mef.JAXPR:
            dump.write(section.name, "1.jaxpr", artifact.read(section).decode())
        elif section.kind == mef.MODULE:
            module = xla_lowering.from_portable_bytecode(artifact.read(section))
            dump.write(section.name, "3.mlir", str(module))
            for graph in functions_of(module).keys() & artifact.json(mef.MANIFEST)["graphs"].keys():
                dump.write(graph, "2.stablehlo.mlir", str(segments.extract(module, graph, ())))
    dump.finish()
