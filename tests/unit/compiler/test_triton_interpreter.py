"""The interpreter of Triton IR: operations against numpy, and that it sees what a GPU would not tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.interpreters import mlir
from jaxlib.triton import dialect as tt

from max.compiler.graph import TensorType
from max.compiler.triton import operations as op
from max.compiler.triton.block import Block
from max.compiler.triton.interpreter import interpret
from max.compiler.triton.kernel import Kernel, build
from max.compiler.triton.numpy_operations import IllegalAccess

F32 = TensorType("float32", (8, 16))
VECTOR = TensorType("float32", (8,))


def rows(pointer: Block) -> Block:
    return pointer + op.arange(8)[:, None] * 16 + op.arange(16)[None, :]


def kernel_of(body: Callable[..., None], operands: list[TensorType], result: TensorType, programs: int = 1) -> Kernel:
    return build("test", operands, [result], body, grid=(programs, 1, 1))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda x: x * 2 + 1, lambda x: x * 2 + 1),
        (lambda x: 1 - x / 3, lambda x: 1 - x / np.float32(3)),
        (op.exp2, np.exp2),
        (op.tanh, np.tanh),
        (lambda x: op.where(x < 0.25, x, 7), lambda x: np.where(x < 0.25, x, 7)),
        (lambda x: op.where((x >= -1) & (x <= 1), 0 * x, x), lambda x: np.where(abs(x) <= 1, 0, x)),
        (lambda x: op.maximum(x, 0) - op.minimum(x, 0.5), lambda x: np.maximum(x, 0) - np.minimum(x, 0.5)),
        (lambda x: x - x.max(1)[:, None], lambda x: x - x.max(1, keepdims=True)),
        (lambda x: x + x.sum(0)[None, :] * x.min(0)[None, :], lambda x: x + x.sum(0) * x.min(0)),
        (lambda x: x.to("bfloat16").to("float32"), lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)),
    ],
)
def test_arithmetic_is_that_of_numpy(compute: Callable, expected: Callable) -> None:
    kernel = kernel_of(lambda x, out: op.store(rows(out), compute(op.load(rows(x)))), [F32], F32)
    x = normal(8, 16)
    np.testing.assert_allclose(interpret(kernel, x)[0], expected(x), rtol=1e-6, atol=1e-6)


def test_bits_are_those_of_numpy() -> None:
    def body(x: Block, out: Block) -> None:
        bits = op.load(x + op.arange(8)).bits("int32")
        ways = [bits ^ -1, bits | 5, bits << 3, bits >> 7, op.where(bits < 0, op.constant(1), 0)]
        for way, each in enumerate(ways):
            op.store(out + (way * 8 + op.arange(8)), each)

    x = normal(8)
    bits = x.view(np.int32)
    expected = [~bits, bits | 5, bits << 3, (x.view(np.uint32) >> 7).view(np.int32), bits < 0]
    found = interpret(kernel_of(body, [VECTOR], TensorType("int32", (5, 8))), x)[0]
    np.testing.assert_array_equal(found, expected)


def test_dot_sums_in_float32() -> None:
    def body(x: Block, y: Block, out: Block) -> None:
        right = op.transpose(op.load(y + op.arange(16)[:, None] * 16 + op.arange(16)[None, :]))
        op.store(rows(out), op.dot(op.load(rows(x)), right, op.full((8, 16), 1, "float32")))

    types = [TensorType("bfloat16", (8, 16)), TensorType("bfloat16", (16, 16))]
    x, y = normal(8, 16).astype(ml_dtypes.bfloat16), normal(16, 16).astype(ml_dtypes.bfloat16)
    expected = x.astype(np.float32) @ y.astype(np.float32).T + 1
    np.testing.assert_allclose(interpret(kernel_of(body, types, F32), x, y)[0], expected, rtol=1e-6)


def test_loops_carry_and_depend_on_memory() -> None:
    """Triangular numbers: row i of the result is the sum of 0, ..., count[i] - 1."""

    def body(counts: Block, out: Block) -> None:
        row = op.program_id(0)
        count = op.load(counts + row)
        (total, turns) = op.loop(
            op.constant(0), count, [op.constant(0), op.constant(0)], lambda i, total, turns: (total + i, turns + 1)
        )
        op.store(out + row * 2, total)
        op.store(out + row * 2 + 1, turns)

    kernel = kernel_of(body, [TensorType("int32", (3,))], TensorType("int32", (3, 2)), programs=3)
    counts = np.array([0, 1, 10], np.int32)
    assert interpret(kernel, counts)[0].tolist() == [[0, 0], [0, 1], [45, 10]]


def test_masks_keep_away_from_memory_and_what_is_not_written_is_nan() -> None:
    def body(x: Block, out: Block) -> None:
        lane = op.arange(16)
        op.store(out + lane, op.load(x + lane, lane < 8, 5), (lane >= 1) & (lane < 4))

    result = interpret(kernel_of(body, [VECTOR], VECTOR), np.arange(8, dtype=np.float32))[0]
    np.testing.assert_array_equal(result, [np.nan, 1, 2, 3, np.nan, np.nan, np.nan, np.nan])


def test_operands_are_left_alone_and_aliases_are_one_memory() -> None:
    def body(x: Block, out: Block) -> None:
        op.store(out, op.load(x + 1))
        op.store(out + 1, op.load(x))

    kernel = build("test", [VECTOR], [VECTOR], body, grid=(1, 1, 1), aliases=[(0, 0)])
    x = np.arange(8, dtype=np.float32)
    assert interpret(kernel, x)[0].tolist() == [1, 1, 2, 3, 4, 5, 6, 7]
    assert x.tolist() == list(range(8))


@pytest.mark.parametrize("offset", [-1, 1])
def test_an_access_outside_of_a_buffer_is_an_error(offset: int) -> None:
    load = kernel_of(lambda x, out: op.store(out, op.load(x + op.arange(8) + offset).sum(0)), [VECTOR], VECTOR)
    store = kernel_of(
        lambda x, out: op.store(out + op.arange(8) + offset, op.arange(8).to("float32")), [VECTOR], VECTOR
    )
    for kernel in (load, store):
        with pytest.raises(IllegalAccess):
            interpret(kernel, normal(8))


def test_an_integer_that_does_not_fit_is_an_error() -> None:
    def body(counts: Block, out: Block) -> None:
        op.store(out, op.load(counts) * 65536)

    one = TensorType("int32", (1,))
    assert interpret(kernel_of(body, [one], one), np.array([32767], np.int32))[0] == 32767 * 65536
    with pytest.raises(OverflowError, match="2147483648 does not fit int32"):
        interpret(kernel_of(body, [one], one), np.array([32768], np.int32))


def test_names_of_jaxlib_s_triton_dialect_and_of_jax_that_are_used() -> None:
    """jaxlib may drop them, as they are there for a part of JAX that is deprecated."""
    folder = Path(op.__file__).parent
    used = {name for path in folder.glob("*.py") for name in re.findall(r"\btt\.(\w+)\(", path.read_text())}
    assert {"FuncOp", "dot", "load", "reduce_return", "register_dialect"} <= used
    assert not {name for name in used if not hasattr(tt, name)}
    assert callable(jax.ffi.ffi_lowering)
    assert callable(mlir.register_lowering) and callable(mlir.lower_fun)
