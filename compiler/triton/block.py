"""The values of a kernel under construction: scalars and blocks whose operators emit Triton IR.

A program of a kernel works on blocks, tensors of static shape whose sizes are powers of two. Operators broadcast as
numpy does; numbers of Python take the other side's type. Everything emits at MLIR's current insertion point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import e, log2
from typing import Literal

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, scf
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
            pointer, offset = _alike(self, _block(other, element_type("int32")))
            return Block(tt.addptr(pointer.value.type, pointer.value, offset.value))
        return self._binary(other, arith.addi, arith.addf)

    def __sub__(self, other: Block | Number) -> Block:
        return self._binary(other, arith.subi, arith.subf)

    def __mul__(self, other: Block | Number) -> Block:
        return self._binary(other, arith.muli, arith.mulf)

    def __truediv__(self, other: Block | Number) -> Block:
        return self._binary(other, None, arith.divf)

    def __floordiv__(self, other: Block | Number) -> Block:
        return self._binary(other, arith.divui, None)

    def __mod__(self, other: Block | Number) -> Block:
        return self._binary(other, arith.remui, None)

    def __and__(self, other: Block) -> Block:
        return self._binary(other, arith.andi, None)

    def __or__(self, other: Block | Number) -> Block:
        return self._binary(other, arith.ori, None)

    def __xor__(self, other: Block | Number) -> Block:
        return self._binary(other, arith.xori, None)

    def __lshift__(self, other: Block | Number) -> Block:
        return self._binary(other, arith.shli, None)

    def __rshift__(self, other: Block | Number) -> Block:
        return self._binary(other, arith.shrui, None)

    def __radd__(self, other: Number) -> Block:
        return _block(other, self.element) + self

    def __rsub__(self, other: Number) -> Block:
        return _block(other, self.element) - self

    def __rmul__(self, other: Number) -> Block:
        return _block(other, self.element) * self

    def __rtruediv__(self, other: Number) -> Block:
        return _block(other, self.element) / self

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
        return Block(convert(_of_shape(self.shape, target), self.value))

    def bits(self, dtype: Dtype) -> Block:
        """The same bits as another dtype of their size."""
        return Block(tt.bitcast(_of_shape(self.shape, element_type(dtype)), self.value))

    def max(self, axis: int) -> Block:
        """The largest along an axis, which goes away."""
        return self._reduce(axis, arith.maximumf if self.is_float else arith.maxsi)

    def min(self, axis: int) -> Block:
        """The smallest along an axis, which goes away."""
        return self._reduce(axis, arith.minimumf if self.is_float else arith.minsi)

    def sum(self, axis: int) -> Block:
        """The sum along an axis, which goes away."""
        return self._reduce(axis, arith.addf if self.is_float else arith.addi)

    def _binary(self, other: Block | Number, integers: Callable | None, floats: Callable | None) -> Block:
        left, right = _alike(self, _block(other, self.element))
        operation = floats if left.is_float else integers
        assert operation is not None, f"not an operation of {left.element}"
        return Block(operation(left.value, right.value))

    def _compare(self, other: Block | Number, integers: str, floats: str) -> Block:
        left, right = _alike(self, _block(other, self.element))
        if left.is_float:
            return Block(arith.cmpf(arith.CmpFPredicate[floats.upper()], left.value, right.value))
        return Block(arith.cmpi(arith.CmpIPredicate[integers], left.value, right.value))

    def _reduce(self, axis: int, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> Block:
        reduce = tt.ReduceOp([self.value], axis)
        body = reduce.regions[0].blocks.append(self.element, self.element)
        with ir.InsertionPoint(body):
            tt.reduce_return([combine(*body.arguments)])
        return Block(reduce.results[0])


# --- making and moving blocks --------------------------------------------------------------------------------------


def program_id(axis: int) -> Block:
    """The index of this program along an axis of the grid."""
    return Block(tt.get_program_id(axis))


def arange(size: int) -> Block:
    """0, 1, ... as int32 (size,)."""
    return Block(tt.make_range(_of_shape((size,), element_type("int32")), 0, size))


def constant(number: Number, dtype: Dtype = "int32") -> Block:
    """A scalar."""
    return _block(number, element_type(dtype))


def full(shape: tuple[int, ...], number: Number, dtype: Dtype) -> Block:
    """A block of one number."""
    type = element_type(dtype)
    value = ir.FloatAttr.get(type, number) if isinstance(type, ir.FloatType) else ir.IntegerAttr.get(type, int(number))
    return Block(arith.constant(_of_shape(shape, type), ir.DenseElementsAttr.get_splat(_of_shape(shape, type), value)))


def load(pointer: Block, mask: Block | None = None, other: Number = 0) -> Block:
    """What lies at the pointers; `other` where the mask is false, without touching memory."""
    if mask is None:
        return Block(tt.load(pointer.value))
    pointer, mask = _alike(pointer, mask)
    pointee = tt.PointerType(pointer.element).pointee_type
    filling = Block(_splat(_block(other, pointee), pointer.shape).value)
    return Block(tt.load(pointer.value, mask=mask.value, other=filling.value))


def store(pointer: Block, value: Block, mask: Block | None = None) -> None:
    """Writes to the pointers where the mask is true."""
    shape = pointer.shape
    tt.store(pointer.value, _broadcast(value, shape).value, mask=_broadcast(mask, shape).value if mask else None)


def where(condition: Block, left: Block, right: Block | Number) -> Block:
    """left or right, element by element."""
    left, right = _alike(left, _block(right, left.element))
    shape = _common_shape(condition.shape, left.shape)
    return Block(
        arith.select(_broadcast(condition, shape).value, _broadcast(left, shape).value, _broadcast(right, shape).value)
    )


def maximum(left: Block, right: Block | Number) -> Block:
    """The larger, element by element."""
    return left._binary(right, arith.maxsi, arith.maximumf)


def minimum(left: Block, right: Block | Number) -> Block:
    """The smaller, element by element."""
    return left._binary(right, arith.minsi, arith.minimumf)


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


# --- broadcasting --------------------------------------------------------------------------------------------------


def _of_shape(shape: tuple[int, ...], element: ir.Type) -> ir.Type:
    return ir.RankedTensorType.get(shape, element) if shape else element


def _block(x: Block | Number, element: ir.Type) -> Block:
    if isinstance(x, Block):
        return x
    if isinstance(element, ir.FloatType):
        return Block(arith.constant(element, ir.FloatAttr.get(element, float(x))))
    return Block(arith.constant(element, ir.IntegerAttr.get(element, int(x))))


def _alike(left: Block, right: Block) -> tuple[Block, Block]:
    shape = _common_shape(left.shape, right.shape)
    return _broadcast(left, shape), _broadcast(right, shape)


def _common_shape(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    if not left or not right:
        return left or right
    assert len(left) == len(right), f"blocks of {left} and {right}: say where the axes of size one are"
    return tuple(max(sizes) for sizes in zip(left, right, strict=True))


def _broadcast(x: Block, shape: tuple[int, ...]) -> Block:
    if x.shape == shape:
        return x
    if not x.shape:
        return _splat(x, shape)
    return Block(tt.broadcast(_of_shape(shape, x.element), x.value))


def _splat(x: Block, shape: tuple[int, ...]) -> Block:
    return Block(tt.splat(_of_shape(shape, x.element), x.value)) if shape else x
