"""The adapter to jax and MLIR: traces a graph, lowers it to StableHLO, and writes and reads modules as bytecode.

jax itself is imported by the functions that need it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import CompileError
from .counters import COUNTERS
from .xla import jaxlib

if TYPE_CHECKING:
    from jaxlib.mlir import ir

    from .graph import Graph


class Lowered(NamedTuple):
    """Stages 1 and 2 of a graph."""

    jaxpr: str
    stablehlo: bytes


def lower(graph: Graph, platform: str) -> Lowered:
    """Traces a graph and lowers it to StableHLO bytecode with one public function, `main`. Needs no device.

    Raises whatever `graph.forward` raises, and CompileError for outputs that do not fit the graph's state.
    """
    import jax
    from jax._src.interpreters import mlir

    _keep_plugins_out()
    arguments = graph.arguments
    shapes = [jax.ShapeDtypeStruct(argument.type.shape, argument.type.dtype) for argument in arguments]
    donated = [i for i, argument in enumerate(arguments) if argument.role == "state"]
    traced = jax.jit(_named(graph.call_flat, graph.name), keep_unused=True, donate_argnums=donated).trace(*shapes)
    COUNTERS.traced += 1
    _check_state(graph, jax.tree.leaves(traced.out_info))
    lowered: Any = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    return Lowered(str(traced.jaxpr), mlir.module_to_bytecode(lowered))


def _keep_plugins_out() -> None:
    """Spares jax the plugins of devices, which are installed to compile for and need not be here: loading them costs
    memory and time, and one fails with a traceback."""
    from jax._src import xla_bridge

    if os.environ.get("JAX_PLATFORMS") == "cpu":
        xla_bridge._plugins_registered = True


def _check_state(graph: Graph, results: Sequence[Any]) -> None:
    """The new state takes the place of the old one in memory, where PJRT compares byte sizes only."""
    for (name, type), result in zip(graph.state.items(), results[len(results) - len(graph.state) :], strict=True):
        if (str(result.dtype), result.shape) != (type.dtype, type.shape):
            raise CompileError(
                f"graph {graph.name} returns the state {name} as {result.dtype}{list(result.shape)}, not as {type}",
                "Return it with the dtype and shape that it came with.",
            )


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = name
    return call


def mlir_context() -> ir.Context:
    """An MLIR context with the dialects of JAX."""
    from jax._src.interpreters import mlir

    return mlir.make_ir_context()


def bytecode(module: ir.Module) -> bytes:
    """The module as plain MLIR bytecode, for this release only."""
    from jax._src.interpreters import mlir

    return mlir.module_to_bytecode(module)


def portable_bytecode(module: ir.Module) -> bytes:
    """The module as StableHLO portable bytecode, readable by releases of twelve weeks before and all after.

    Operations that StableHLO itself does not have yet, such as the scan of a cumulative sum on devices, are kept as
    this release writes them: then only releases that have them too can read the module.
    """
    from jaxlib.mlir.dialects import stablehlo

    window = stablehlo.StablehloCompatibilityRequirement.WEEK_12
    version = stablehlo.get_version_from_compatibility_requirement(window)
    source, serialize = bytecode(module), jaxlib()._xla.mlir.serialize_portable_artifact
    try:
        # Unlike the dialect's own function, this one also takes the operations of CHLO, such as erf and top_k.
        return serialize(source, version, False)
    except jaxlib()._xla.JaxRuntimeError:
        return serialize(source, version, True)


def from_portable_bytecode(data: bytes) -> ir.Module:
    """A module kept as portable bytecode, in a context of its own. Imports jaxlib's MLIR, not jax."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        return stablehlo.deserialize_portable_artifact(context, data)
