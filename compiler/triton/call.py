"""A kernel as an operation of JAX: compiled by XLA for GPUs, interpreted wherever else it runs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from .interpreter import interpret
from .kernel import TARGET, Kernel

_triton_call = Primitive("triton_call")
_triton_call.multiple_results = True


def triton_call(kernel: Kernel, *operands: jax.Array) -> list[jax.Array]:
    """Calls a kernel. operands: of the kernel's types; aliased ones become results in place once they are donated."""
    for operand, type in zip(operands, kernel.operands, strict=True):
        assert (str(operand.dtype), operand.shape) == (type.dtype, type.shape), f"{kernel.name}: {operand} is no {type}"
    return _triton_call.bind(*operands, kernel=kernel)


@_triton_call.def_abstract_eval
def _result_types(*operands: Any, kernel: Kernel) -> list[Any]:
    return [ShapedArray(type.shape, jax.numpy.dtype(type.dtype)) for type in kernel.results]


@_triton_call.def_impl
def _interpret(*operands: jax.Array, kernel: Kernel) -> list[jax.Array]:
    return [jax.numpy.asarray(result) for result in interpret(kernel, *map(np.asarray, operands))]


def _call_back(*operands: jax.Array, kernel: Kernel) -> list[jax.Array]:
    results = [jax.ShapeDtypeStruct(type.shape, type.dtype) for type in kernel.results]
    return jax.pure_callback(lambda *given: list(interpret(kernel, *map(np.asarray, given))), results, *operands)


def _lower_to_ir(context: mlir.LoweringRuleContext, *operands: Any, kernel: Kernel) -> Any:
    grid = dict(zip(("grid_x", "grid_y", "grid_z"), kernel.grid, strict=True))
    numbers = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, **grid}
    attributes = {
        "name": mlir.ir.StringAttr.get(kernel.name),
        "ir": mlir.ir.StringAttr.get(kernel.ir),
        "debug": mlir.ir.BoolAttr.get(False),
        **{name: mlir.i32_attr(number) for name, number in numbers.items()},
    }
    lower = jax.ffi.ffi_lowering(TARGET, backend_config=attributes, operand_output_aliases=dict(kernel.aliases))
    return lower(context, *operands)


mlir.register_lowering(_triton_call, mlir.lower_fun(_call_back, multiple_results=True), platform="cpu")
for _platform in ("cuda", "rocm"):
    mlir.register_lowering(_triton_call, _lower_to_ir, platform=_platform)
