"""A kernel: Triton IR with its grid, and the types of what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..graph import TensorType

TARGET = "__gpu$xla.gpu.triton"
"""The custom call that XLA compiles a kernel's IR for."""

_ALIGNMENT = 16  # bytes; XLA's buffers start at multiples of at least this, and wide loads need to know it


@dataclass(frozen=True)
class Kernel:
    """What XLA needs for one kernel. Called on operands of the given types, it returns `results`.

    aliases: (operand, result) pairs that are the same memory
    grid:    programs along each of three axes
    """

    name: str
    operands: tuple[TensorType, ...]
    results: tuple[TensorType, ...]
    aliases: tuple[tuple[int, int], ...]
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    ir: str = field(repr=False)


def build(
    name: str,
    operands: Sequence[TensorType],
    results: Sequence[TensorType],
    body: Callable[..., None],
    *,
    grid: tuple[int, int, int],
    num_warps: int = 4,
    num_stages: int = 1,
    aliases: Sequence[tuple[int, int]] = (),
) -> Kernel:
    """Emits a kernel. body: called with a pointer to the first element of each operand, then of each result."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.passmanager import PassManager
    from jaxlib.triton import dialect as tt

    from .block import Block, pointer_type
    from .dialect import register

    with ir.Context() as context, ir.Location.unknown():
        register(context)
        module = ir.Module.create()
        pointers = [pointer_type(argument.dtype) for argument in (*operands, *results)]
        alignment = ir.DictAttr.get(
            {"tt.divisibility": ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _ALIGNMENT)}
        )
        with ir.InsertionPoint(module.body):
            function = tt.FuncOp(
                name,
                ir.TypeAttr.get(ir.FunctionType.get(pointers, [])),
                sym_visibility="public",
                arg_attrs=ir.ArrayAttr.get([alignment] * len(pointers)),
                res_attrs=ir.ArrayAttr.get([]),
            )
        entry = function.body.blocks.append(*pointers)
        with ir.InsertionPoint(entry):
            body(*map(Block, entry.arguments))
            tt.return_([])
        # Also shortens what travels: one constant for all of its uses.
        PassManager.parse("builtin.module(canonicalize,cse)").run(module.operation)
        text = str(module)
    return Kernel(name, tuple(operands), tuple(results), tuple(aliases), grid, num_warps, num_stages, text)
