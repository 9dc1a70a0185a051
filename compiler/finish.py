"""Compiles an artifact from the StableHLO in it, without its model: where code is missing, or fits another host."""

from __future__ import annotations

import time
from dataclasses import replace

from .. import CacheError
from ..cache import mef
from . import code_sections, segments, xla_lowering
from .artifact import Options, Summary, compile_with_progress
from .graph import TensorType
from .merge import functions_of
from .targets import Target


def finish(artifact: mef.Mef, target: Target, writer: mef.MefWriter, options: Options | None = None) -> Summary:
    """Writes the artifact anew with code for a target; of `options`, those of stage 5 are used.

    target: of the same lowering as the one that the artifact was made for: the kernels that graphs call decide that.
    Raises CacheError for a damaged artifact or one for another platform, CompileError as a compilation does.
    """
    weights = artifact.find(mef.WEIGHTS, "") and artifact.json(mef.WEIGHTS)
    options = replace(options or Options(), weights=weights)
    made_for = Target.parse(artifact.json(mef.COMPAT)["target"])
    if (made_for.platform, made_for.devices) != (target.platform, target.devices):
        raise CacheError(
            f"the artifact was lowered for {made_for.name}, and {target.name} takes other graphs",
            f"Compile the model itself: max warm-cache --target {target.name}.",
        )
    started = time.perf_counter()
    signatures = artifact.json(mef.SIGNATURES)
    compiled = compile_with_progress(sources_of(artifact), target, options)
    summary = Summary(graphs=len(artifact.json(mef.MANIFEST)["graphs"]), executables=len(compiled))
    summary.seconds["compile"] = time.perf_counter() - started
    for section in artifact.sections():
        if section.kind == mef.MANIFEST:
            manifest = artifact.json(mef.MANIFEST)
            writer.add_json(mef.MANIFEST, section.name, {**manifest, "target": target.name})
        elif section.kind not in code_sections.KINDS:
            writer.add(section.kind, section.name, artifact.read(section), target=section.target)
    types = {name: (_types(row["arguments"]), _types(row["results"])) for name, row in signatures.items()}
    code = code_sections.Code(target, compiled, types, summary.seconds, options.products)
    code.write(writer)
    summary.artifact_id = writer.finish()
    options.dump.finish()
    return summary


def sources_of(artifact: mef.Mef) -> dict[str, bytes]:
    """The bytecode of every executable, cut from an artifact's merged module; raises CacheError for a damaged one."""
    signatures = artifact.json(mef.SIGNATURES)
    section = next((section for section in artifact.sections() if section.kind == mef.MODULE), None)
    if section is None:
        raise CacheError("the artifact holds no StableHLO", "Compile the model itself.")
    module = xla_lowering.from_portable_bytecode(artifact.read(section))
    if absent := signatures.keys() - functions_of(module).keys():
        raise CacheError(f"the artifact's StableHLO lacks {', '.join(sorted(absent))}", "Compile the model itself.")
    pairs = {name: tuple((a, b) for a, b in row["aliases"]) for name, row in signatures.items()}
    return {name: xla_lowering.bytecode(segments.extract(module, name, aliases)) for name, aliases in pairs.items()}


def _types(rows: list[dict[str, object]]) -> list[TensorType]:
    return [TensorType(str(row["dtype"]), tuple(row["shape"])) for row in rows]  # type: ignore[arg-type]
