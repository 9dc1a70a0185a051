"""What a kernel does with blocks beside their operators: makes, moves, chooses, multiplies and loops over them.

Everything emits Triton IR at MLIR's current insertion point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import e, log2

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, scf
from jaxlib.triton import dialect as tt

from .block import Block, Dtype, Number, alike, as_block, broadcast, common_shape, element_type, splat, type_of


def program_id(axis: int) -> Block:
    """The index of this program along an axis of the grid."""
    return Block(tt.get_program_id(axis))


def arange(size: int) -> Block:
    """0, 1, ... as int32 (size,)."""
    return Block(tt.make_range(type_of((size,), element_type("int32")), 0, size))


def constant(number: Number, dtype: Dtype = "int32") -> Block:
    """A scalar."""
    return as_block(number, element_type(dtype))


def full(shape: tuple[int, ...], number: Number, dtype: Dtype) -> Block:
    """A block of one number."""
    type = element_type(dtype)
    value = ir.FloatAttr.get(type, number) if isinstance(type, ir.FloatType) else ir.IntegerAttr.get(type, int(number))
    return Block(arith.constant(type_of(shape, type), ir.DenseElementsAttr.get_splat(type_of(shape, type), value)))


def load(pointer: Block, mask: Block | None = None, other: Number = 0) -> Block:
    """What lies at the pointers; `other` where the mask is false, without touching memory."""
    if mask is None:
        return Block(tt.load(pointer.value))
    pointer, mask = alike(pointer, mask)
    pointee = tt.PointerType(pointer.element).pointee_type
    filling = Block(splat(as_block(other, pointee), pointer.shape).value)
    return Block(tt.load(pointer.value, mask=mask.value, other=filling.value))


def store(pointer: Block, value: Block, mask: Block | None = None) -> None:
    """Writes to the pointers where the mask is true."""
    shape = pointer.shape
    tt.store(pointer.value, broadcast(value, shape).value, mask=broadcast(mask, shape).value if mask else None)


def where(condition: Block, left: Block, right: Block | Number) -> Block:
    """left or right, element by element."""
    left, right = alike(left, as_block(right, left.element))
    shape = common_shape(condition.shape, left.shape)
    return Block(
        arith.select(broadcast(condition, shape).value, broadcast(left, shape).value, broadcast(right, shape).value)
    )


def maximum(left: Block, right: Block | Number) -> Block:
    """The larger, element by element."""
    return left.binary(right, arith.maxsi, arith.maximumf)


def minimum(left: Block, right: Block | Number) -> Block:
    """The smaller, element by element."""
    return left.binary(right, arith.minsi, arith.minimumf)


def exp2(x: Block) -> Block:
    """2 ** x."""
    return Block(math.exp2(x.value))


def rsqrt(x: Block) -> Block:
    """1 / sqrt(x)."""
    return Block(math.rsqrt(x.value))


def tanh(x: Block) -> Block:
    """The hyperbolic tangent, right within 1e-7; by exp2, as GPUs have no common instruction for it."""
    return 1 - 2 / (exp2(x * (2 * log2(e))) + 1)


def transpose(x: Block) -> Block:
    """The transposed matrix."""
    return Block(tt.trans(x.value, [1, 0]))


def dot(left: Block, right: Block, to: Block) -> Block:
    """left @ right + to. Operands in one dtype, sums in float32; float32 operands are multiplied as such."""
    assert left.element == right.element, "operands of one dtype"
    return Block(
        tt.dot(left.value, right.value, to.value, input_precision=ir.IntegerAttr.get(element_type("int32"), 2))
    )


def loop(start: Block, stop: Block, carry: Sequence[Block], body: Callable[..., Sequence[Block]]) -> list[Block]:
    """Calls body(i, *carry) for i = start, ..., stop - 1, each with what the one before returned; the last of it."""
    one = constant(1)
    operation = scf.ForOp(start.value, stop.value, one.value, [item.value for item in carry])
    with ir.InsertionPoint(operation.body):
        result = body(Block(operation.induction_variable), *map(Block, operation.inner_iter_args))
        scf.yield_([item.value for item in result])
    return [Block(value) for value in operation.results]
