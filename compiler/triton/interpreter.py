"""Runs a kernel's IR with numpy, program after program: what tests compare, and what the CPU does with a kernel.

It is stricter than a GPU: memory that nobody wrote is NaN, and an access outside of its buffer or an integer that does
not fit its type is an error.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ..graph import TensorType
from .kernel import Kernel
from .numpy_operations import OPERATIONS, Pointers, Value

Values = list[Value]
"""The values of a program by their number."""

Step = Callable[[Values], None]


def interpret(kernel: Kernel, *operands: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the kernel returns for these operands, which it leaves as they are."""
    for operand, type in zip(operands, kernel.operands, strict=True):
        assert (operand.dtype.name, operand.shape) == (type.dtype, type.shape), (
            f"{operand.dtype}{operand.shape}: {type}"
        )
    sources = {result: operand for operand, result in kernel.aliases}
    memory = [operand.reshape(-1) for operand in operands]
    for number, type in enumerate(kernel.results):
        memory.append(memory[sources[number]].copy() if number in sources else _poisoned(type))
    for result, source in sources.items():
        memory[source] = memory[len(operands) + result]
    program = _program(kernel.ir)
    with np.errstate(all="ignore"):
        for place in itertools.product(*map(range, kernel.grid)):
            program(place, memory)
    return tuple(memory[len(operands) + i].reshape(type.shape) for i, type in enumerate(kernel.results))


def _poisoned(type: TensorType) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, type.dtype, type.dtype))
    size = int(np.prod(type.shape))
    return np.full(size, np.nan, dtype) if dtype.kind in "fV" else np.full(size, np.iinfo(dtype).min, dtype)


@functools.lru_cache(maxsize=64)
def _program(text: str) -> Callable[[tuple[int, ...], list[np.ndarray]], None]:
    """One program of the grid as a function of its place and of the buffers."""
    from jaxlib.mlir import ir

    from .dialect import register

    with ir.Context() as context, ir.Location.unknown():
        register(context)
        module = ir.Module.parse(text)
        entry = module.body.operations[0].regions[0].blocks[0]
        reader = _Reader()
        arguments = [reader.number(argument) for argument in entry.arguments]
        steps, _ = reader.read(entry)

    def run(place: tuple[int, ...], memory: list[np.ndarray]) -> None:
        values: Values = [None] * reader.count
        values[0] = place
        for number, buffer in zip(arguments, memory, strict=True):
            values[number] = Pointers(buffer, np.int64(0))
        for step in steps:
            step(values)

    return run


class _Reader:
    """Turns blocks of operations into steps; value 0 is the program's place in the grid."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}
        self.count = 1

    def number(self, value: Any) -> int:
        """The number of a value that is defined here."""
        self.numbers[value] = self.count
        self.count += 1
        return self.count - 1

    def read(self, block: Any) -> tuple[list[Step], list[int]]:
        """The block's steps, and the values that its last operation hands on."""
        *operations, last = block.operations
        return [self._step(item.operation) for item in operations], [self.numbers[value] for value in last.operands]

    def _step(self, operation: Any) -> Step:
        operands = [self.numbers[value] for value in operation.operands]
        if operation.name == "scf.for":
            return self._loop(operation, operands)
        function = OPERATIONS[operation.name](operation)
        results = [self.number(result) for result in operation.results]
        if operation.name == "tt.get_program_id":
            operands = [0]

        def step(values: Values) -> None:
            result = function(*[values[number] for number in operands])
            if results:
                values[results[0]] = result

        return step

    def _loop(self, operation: Any, operands: list[int]) -> Step:
        start, stop, stride, *carry = operands
        body = operation.regions[0].blocks[0]
        index, *inner = [self.number(argument) for argument in body.arguments]
        steps, yielded = self.read(body)
        results = [self.number(result) for result in operation.results]

        def step(values: Values) -> None:
            state = [values[number] for number in carry]
            for i in range(values[start], values[stop], values[stride]):
                values[index] = np.int32(i)
                for number, item in zip(inner, state, strict=True):
                    values[number] = item
                for each in steps:
                    each(values)
                state = [values[number] for number in yielded]
            for number, item in zip(results, state, strict=True):
                values[number] = item

        return step
