"""The values of a kernel under construction: scalars and blocks whose operators emit Triton IR.

A program of a kernel works on blocks, tensors of static shape whose sizes are powers of two. Operators broadcast as
numpy does; numbers of Python take the other side's type. Everything emits at MLIR's current insertion point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.triton import dialect as tt

Number = int | float
Dtype = Literal["float32", "bfloat16", "int32", "int64", "bool"]


def element_type(dtype: str) -> ir.Type:
    """The MLIR type of a dtype's name."""
    return {
        "float32": ir.F32Type.get,
        "bfloat16": ir.BF16Type.get,
        "int32": lambda: ir.IntegerType.get_signless(32),
        "int64": lambda: ir.IntegerType.get_signless(64),
        "bool": lambda: ir.IntegerType.get_signless(1),
    }[dtype]()


def pointer_type(dtype: str) -> ir.Type:
    """The MLIR type of a pointer into a buffer in the GPU's memory."""
    return tt.PointerType.get(element_type(dtype), 1)


class Block:
    """A scalar or a block of numbers or pointers. Division, remainder and the shift to the
    right are those of unsigned integers."""

    __slots__ = ("value",)

    def __init__(self, value: ir.Value) -> None:
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's sizes; () of a scalar."""
        type = self.value.type
        return tuple(ir.RankedTensorType(type).shape) if isinstance(type, ir.RankedTensorType) else ()

    @property
    def element(self) -> ir.Type:
        """The type of its elements."""
        type = self.value.type
        return ir.RankedTensorType(type).element_type if isinstance(type, ir.RankedTensorType) else type

    @property
    def is_float(self) -> bool:
        return isinstance(self.element, ir.FloatType)

    @property
    def is_pointer(self) -> bool:
        return isinstance(self.element, tt.PointerType)

    def __add__(self, other: Block | Number) -> Block:
        if self.is_pointer:
            pointer, offset = alike(self, as_block(other, element_type("int32")))
            return Block(tt.addptr(pointer.value.type, pointer.value, offset.value))
        return self.binary(other, arith.addi, arith.addf)

    def __sub__(self, other: Block | Number) -> Block:
        return self.binary(other, arith.subi, arith.subf)

    def __mul__(self, other: Block | Number) -> Block:
        return self.binary(other, arith.muli, arith.mulf)

    def __truediv__(self, other: Block | Number) -> Block:
        return self.binary(other, None, arith.divf)

    def __floordiv__(self, other: Block | Number) -> Block:
        return self.binary(other, arith.divui, None)

    def __mod__(self, other: Block | Number) -> Block:
        return self.binary(other, arith.remui, None)

    def __and__(self, other: Block) -> Block:
        return self.binary(other, arith.andi, None)

    def __or__(self, other: Block | Number) -> Block:
        return self.binary(other, arith.ori, None)

    def __xor__(self, other: Block | Number) -> Block:
        return self.binary(other, arith.xori, None)

    def __lshift__(self, other: Block | Number) -> Block:
        return self.binary(other, arith.shli, None)

    def __rshift__(self, other: Block | Number) -> Block:
        return self.binary(other, arith.shrui, None)

    def __radd__(self, other: Number) -> Block:
        return as_block(other, self.element) + self

    def __rsub__(self, other: Number) -> Block:
        return as_block(other, self.element) - self

    def __rmul__(self, other: Number) -> Block:
        return as_block(other, self.element) * self

    def __rtruediv__(self, other: Number) -> Block:
        return as_block(other, self.element) / self

    def __lt__(self, other: Block | Number) -> Block:
        return self._compare(other, "slt", "olt")

    def __le__(self, other: Block | Number) -> Block:
        return self._compare(other, "sle", "ole")

    def __gt__(self, other: Block | Number) -> Block:
        return self._compare(other, "sgt", "ogt")

    def __ge__(self, other: Block | Number) -> Block:
        return self._compare(other, "sge", "oge")

    def __getitem__(self, key: tuple[slice | None, ...]) -> Block:
        """Sets in axes of size one: x[:, None] as of numpy, with full slices and None only."""
        result = self
        for axis, part in enumerate(key):
            if part is None:
                result = Block(tt.expand_dims(result.value, axis))
        return result

    def to(self, dtype: Dtype) -> Block:
        """The block in another dtype; integers are widened with their sign, floats rounded to nearest even."""
        target = element_type(dtype)
        if self.element == target:
            return self
        bits = target.width if isinstance(target, ir.FloatType | ir.IntegerType) else 0
        wider = bits > self.element.width  # type: ignore[attr-defined]
        if not isinstance(target, ir.FloatType):
            assert not self.is_float, "no kernel rounds floats to integers"
            convert = arith.extsi if wider else arith.trunci
        elif self.is_float:
            convert = arith.extf if wider else arith.truncf
        else:
            convert = arith.sitofp
        return Block(convert(type_of(self.shape, target), self.value))

    def bits(self, dtype: Dtype) -> Block:
        """The same bits as another dtype of their size."""
        return Block(tt.bitcast(type_of(self.shape, element_type(dtype)), self.value))

    def max(self, axis: int) -> Block:
        """The largest along an axis, which goes away."""
        return self._reduce(axis, arith.maximumf if self.is_float else arith.maxsi)

    def min(self, axis: int) -> Block:
        """The smallest along an axis, which goes away."""
        return self._reduce(axis, arith.minimumf if self.is_float else arith.minsi)

    def sum(self, axis: int) -> Block:
        """The sum along an axis, which goes away."""
        return self._reduce(axis, arith.addf if self.is_float else arith.addi)

    def binary(self, other: Block | Number, integers: Callable | None, floats: Callable | None) -> Block:
        """The dialects' operation for integers or for floats, element by element; None where there is none."""
        left, right = alike(self, as_block(other, self.element))
        operation = floats if left.is_float else integers
        assert operation is not None, f"not an operation of {left.element}"
        return Block(operation(left.value, right.value))

    def _compare(self, other: Block | Number, integers: str, floats: str) -> Block:
        left, right = alike(self, as_block(other, self.element))
        if left.is_float:
            return Block(arith.cmpf(arith.CmpFPredicate[floats.upper()], left.value, right.value))
        return Block(arith.cmpi(arith.CmpIPredicate[integers], left.value, right.value))

    def _reduce(self, axis: int, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> Block:
        reduce = tt.ReduceOp([self.value], axis)
        body = reduce.regions[0].blocks.append(self.element, self.element)
        with ir.InsertionPoint(body):
            tt.reduce_return([combine(*body.arguments)])
        return Block(reduce.results[0])


# --- broadcasting --------------------------------------------------------------------------------------------------


def type_of(shape: tuple[int, ...], element: ir.Type) -> ir.Type:
    """The MLIR type of a block, or of a scalar where the shape is ()."""
    return ir.RankedTensorType.get(shape, element) if shape else element


def as_block(x: Block | Number, element: ir.Type) -> Block:
    """A number as a scalar of this type; blocks are left as they are."""
    if isinstance(x, Block):
        return x
    if isinstance(element, ir.FloatType):
        return Block(arith.constant(element, ir.FloatAttr.get(element, float(x))))
    return Block(arith.constant(element, ir.IntegerAttr.get(element, int(x))))


def alike(left: Block, right: Block) -> tuple[Block, Block]:
    """Both in the shape that they have in common."""
    shape = common_shape(left.shape, right.shape)
    return broadcast(left, shape), broadcast(right, shape)


def common_shape(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """What two shapes broadcast to; a scalar takes any."""
    if not left or not right:
        return left or right
    assert len(left) == len(right), f"blocks of {left} and {right}: say where the axes of size one are"
    return tuple(max(sizes) for sizes in zip(left, right, strict=True))


def broadcast(x: Block, shape: tuple[int, ...]) -> Block:
    """The block in a shape that it broadcasts to."""
    if x.shape == shape:
        return x
    if not x.shape:
        return splat(x, shape)
    return Block(tt.broadcast(type_of(shape, x.element), x.value))


def splat(x: Block, shape: tuple[int, ...]) -> Block:
    """A scalar in every place of a block."""
    return Block(tt.splat(type_of(shape, x.element), x.value)) if shape else x
