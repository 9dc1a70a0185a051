"""The operations of kernels in numpy: from each operation of the IR to a function of its operands' values.

An access outside of its buffer and an integer that does not fit its type are errors, as they are on no GPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Value = Any
"""A numpy scalar or array, or `Pointers`."""


class Pointers(NamedTuple):
    """Places in one flat buffer; offsets are int64, in elements."""

    memory: np.ndarray
    offsets: Any


class IllegalAccess(IndexError):
    """A kernel reads or writes outside of a buffer."""


Factory = Callable[[Any], Callable[..., Value]]
"""From an operation of the IR to a function of its operands."""


def _dtype(type: Any) -> np.dtype:
    return np.dtype({"bf16": ml_dtypes.bfloat16, "f32": "f4", "i1": "?", "i32": "i4", "i64": "i8"}[str(type)])


def _type(operation: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and element type of an operation's result."""
    type = operation.results[0].type
    return (tuple(type.shape), type.element_type) if hasattr(type, "element_type") else ((), type)


def _plain(function: Callable[..., Value]) -> Factory:
    return lambda operation: function


def _checked(function: Callable[[Any, Any], Any]) -> Factory:
    """Integer arithmetic; a result that does not fit is an error."""

    def checked(left: Any, right: Any) -> Any:
        exact = function(np.asarray(left, np.int64), np.asarray(right, np.int64))
        result = exact.astype(left.dtype)
        if not np.array_equal(result, exact):
            raise OverflowError(f"a result of {exact.max()} does not fit {left.dtype}")
        return result

    return _plain(checked)


def _constant(operation: Any) -> Callable[..., Value]:
    shape, element = _type(operation)
    value = operation.attributes["value"]
    if shape:
        assert value.is_splat, "only blocks of one number are constants"
        value = value.get_splat_value()
    number = np.asarray(value.value).astype(_dtype(element))[()]
    result = np.full(shape, number) if shape else number
    return lambda: result


def _convert(operation: Any) -> Callable[..., Value]:
    dtype = _dtype(_type(operation)[1])
    return lambda x: x.astype(dtype)


def _from_bool(operation: Any) -> Callable[..., Value]:
    source = operation.operands[0].type
    assert str(getattr(source, "element_type", source)) == "i1", "other integers are widened with their sign"
    return _convert(operation)


def _bitcast(operation: Any) -> Callable[..., Value]:
    dtype = _dtype(_type(operation)[1])
    return lambda x: np.asarray(x).view(dtype)[()]


def _shift_right(x: Any, places: Any) -> Any:
    unsigned = np.asarray(x)
    unsigned = unsigned.view(f"u{unsigned.itemsize}")
    return (unsigned >> np.asarray(places).astype(unsigned.dtype)).view(np.asarray(x).dtype)[()]


_INTEGERS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
_FLOATS = {1: operator.eq, 2: operator.gt, 3: operator.ge, 4: operator.lt, 5: operator.le, 6: operator.ne}


def _compare_integers(operation: Any) -> Callable[..., Value]:
    return _INTEGERS[operation.attributes["predicate"].value]


def _compare_floats(operation: Any) -> Callable[..., Value]:
    return _FLOATS[operation.attributes["predicate"].value]


def _add_to_pointer(pointers: Pointers, offsets: Any) -> Pointers:
    return Pointers(pointers.memory, pointers.offsets + np.asarray(offsets, np.int64))


def _moved(move: Callable[[Any, Any], Any]) -> Factory:
    """An operation that moves elements, of pointers too: along its axis, or into the shape of its result."""

    def factory(operation: Any) -> Callable[..., Value]:
        attributes = operation.attributes
        where = attributes["axis"].value if "axis" in attributes else _type(operation)[0]

        def function(x: Value) -> Value:
            return Pointers(x.memory, move(x.offsets, where)) if isinstance(x, Pointers) else move(x, where)

        return function

    return factory


def _load(pointers: Pointers, mask: Any = None, other: Any = None) -> Any:
    if mask is None:
        return pointers.memory[_within(pointers.offsets, pointers.memory)]
    result = np.array(other)
    result[mask] = pointers.memory[_within(pointers.offsets[mask], pointers.memory)]
    return result


def _store(pointers: Pointers, value: Any, mask: Any = True) -> None:
    mask = np.broadcast_to(mask, np.shape(value))
    pointers.memory[_within(np.asarray(pointers.offsets)[mask], pointers.memory)] = np.asarray(value)[mask]


def _within(offsets: Any, memory: np.ndarray) -> Any:
    if np.any(offsets < 0) or np.any(offsets >= memory.size):
        raise IllegalAccess(f"element {np.min(offsets)} or {np.max(offsets)} of a buffer of {memory.size}")
    return offsets


def _dot(left: np.ndarray, right: np.ndarray, to: np.ndarray) -> np.ndarray:
    return left.astype(np.float32) @ right.astype(np.float32) + to


def _reduce(operation: Any) -> Callable[..., Value]:
    axis = operation.attributes["axis"].value
    combine = operation.regions[0].blocks[0].operations[0].operation.name
    ufunc = {
        "arith.addf": np.add, "arith.addi": np.add, "arith.maximumf": np.maximum, "arith.maxsi": np.maximum,
        "arith.minimumf": np.minimum, "arith.minsi": np.minimum,
    }[combine]  # fmt: skip
    return lambda x: ufunc.reduce(x, axis=axis)


def _arange(operation: Any) -> Callable[..., Value]:
    start, end = (operation.attributes[name].value for name in ("start", "end"))
    result = np.arange(start, end, dtype=np.int32)
    return lambda: result


def _program_id(operation: Any) -> Callable[..., Value]:
    axis = operation.attributes["axis"].value
    return lambda place: np.int32(place[axis])


OPERATIONS: dict[str, Factory] = {
    "arith.constant": _constant,
    "arith.addi": _checked(np.add),
    "arith.subi": _checked(np.subtract),
    "arith.muli": _checked(np.multiply),
    "arith.divui": _checked(np.floor_divide),
    "arith.divsi": _checked(np.floor_divide),
    "arith.remui": _checked(np.remainder),
    "arith.maxsi": _plain(np.maximum),
    "arith.minsi": _plain(np.minimum),
    "arith.andi": _plain(np.bitwise_and),
    "arith.ori": _plain(np.bitwise_or),
    "arith.xori": _plain(np.bitwise_xor),
    "arith.shli": _plain(np.left_shift),
    "arith.shrui": _plain(_shift_right),
    "arith.addf": _plain(np.add),
    "arith.subf": _plain(np.subtract),
    "arith.mulf": _plain(np.multiply),
    "arith.divf": _plain(np.divide),
    "arith.maximumf": _plain(np.maximum),
    "arith.minimumf": _plain(np.minimum),
    "arith.cmpi": _compare_integers,
    "arith.cmpf": _compare_floats,
    "arith.select": _plain(np.where),
    "arith.extf": _convert,
    "arith.truncf": _convert,
    "arith.extsi": _convert,
    "arith.extui": _from_bool,
    "arith.trunci": _convert,
    "arith.sitofp": _convert,
    "math.exp2": _plain(np.exp2),
    "math.rsqrt": _plain(lambda x: 1 / np.sqrt(x)),
    "tt.addptr": _plain(_add_to_pointer),
    "tt.bitcast": _bitcast,
    "tt.broadcast": _moved(np.broadcast_to),
    "tt.dot": _plain(_dot),
    "tt.expand_dims": _moved(np.expand_dims),
    "tt.get_program_id": _program_id,
    "tt.load": _plain(_load),
    "tt.make_range": _arange,
    "tt.reduce": _reduce,
    "tt.splat": _moved(np.broadcast_to),
    "tt.store": _plain(_store),
    "tt.trans": _plain(np.transpose),
}
"""By the operations' names."""
