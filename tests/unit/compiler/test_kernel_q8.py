"""The matmul of q8_0 weights against GGUF's format, written down here in numpy, for every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from max.compiler.native import ISAS, Library, library

KERNELS = library()
if KERNELS is None:
    pytest.skip("the package was installed without a C++ compiler", allow_module_level=True)
assert KERNELS is not None
LIB: Library = KERNELS


@pytest.fixture(params=[isa for isa in ISAS if LIB.supports(isa)])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    LIB.select(request.param)
    yield request.param
    LIB.select("")
    LIB.set_num_threads(0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized(weights: np.ndarray) -> np.ndarray:
    """GGUF's blocks of (outputs, inputs) weights: a float16 scale and 32 int8, halves rounded away from zero."""
    blocks = weights.reshape(len(weights), -1, 32)
    unit = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(unit == 0, np.float32(0), np.float32(1) / unit)
    values = (np.trunc(np.abs(scaled) + np.float32(0.5)) * np.sign(scaled)).astype(np.int8)
    return np.concatenate([unit.astype(np.float16).view(np.uint8), values.view(np.uint8)], -1).reshape(len(weights), -1)


def dequantized(blocks: np.ndarray) -> np.ndarray:
    """(outputs, inputs) float64."""
    parts = blocks.reshape(len(blocks), -1, 34)
    scales = np.ascontiguousarray(parts[..., :2]).view(np.float16).astype(np.float64)
    return (scales * np.ascontiguousarray(parts[..., 2:]).view(np.int8)).reshape(len(blocks), -1)


def packed(*parts: np.ndarray) -> np.ndarray:
    """Blocks of one matrix, or of gate and up, in panels."""
    outputs, inputs = len(parts[0]), parts[0].shape[1] // 34 * 32
    memory = np.zeros(LIB.packed_bytes("q8_0", inputs, outputs, swiglu=len(parts) == 2), np.uint8)
    for part, columns in zip(parts, ("gate", "up") if len(parts) == 2 else ("plain",), strict=True):
        LIB.pack(part, memory, "q8_0", columns=columns)
    return memory


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 32, 1), (1, 320, 33), (7, 64, 31), (13, 96, 100), (131, 32, 70)]
)
def test_a_matmul_is_that_of_the_dequantized_weights(isa: str, rows: int, inputs: int, outputs: int) -> None:
    x, gate, up = normal(1, rows, inputs), quantized(normal(2, outputs, inputs)), quantized(normal(3, outputs, inputs))
    y = np.full((rows, outputs), np.nan, np.float32)
    LIB.matmul(x, packed(gate), y, "q8_0")
    want = x.astype(np.float64) @ dequantized(gate).T
    error = 2.0**-23 * (inputs + 2) * (np.abs(x.astype(np.float64)) @ np.abs(dequantized(gate)).T)
    assert np.all(np.abs(y - want) <= error)
    LIB.matmul(x, packed(gate), y, "q8_0", epilogue="bias", bias=normal(4, outputs))
    assert np.all(np.abs(y - want - normal(4, outputs)) <= error + 2.0**-23 * np.abs(want + normal(4, outputs)))
    LIB.matmul(x, packed(gate, up), y, "q8_0", epilogue="swiglu")
    want = want / (1 + np.exp(-want)) * (x.astype(np.float64) @ dequantized(up).T)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * inputs**0.5)


def test_a_row_has_the_same_bits_in_every_batch_and_on_any_threads(isa: str) -> None:
    x, weights = normal(1, 130, 64), packed(quantized(normal(2, 203, 64)))
    LIB.set_num_threads(1)
    alone = np.empty((130, 203), np.float32)
    for row in range(130):
        LIB.matmul(x[row : row + 1], weights, alone[row : row + 1], "q8_0")
    for threads in (1, 3):
        LIB.set_num_threads(threads)
        for batch in (2, 7, 12, 13, 97, 130):
            y = np.empty((batch, 203), np.float32)
            LIB.matmul(x[130 - batch :], weights, y, "q8_0")
            np.testing.assert_array_equal(y.view(np.int32), alone[130 - batch :].view(np.int32))


def test_every_finite_scale_is_read_exactly(isa: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    values = np.zeros((len(bits), 32), np.int8)
    values[:, 3] = np.arange(len(bits)) % 255 - 127
    blocks = np.concatenate([bits.view(np.uint8).reshape(-1, 2), values.view(np.uint8)], axis=1)
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = 1
    y = np.empty((1, len(bits)), np.float32)
    LIB.matmul(x, packed(blocks), y, "q8_0")
    np.testing.assert_array_equal(y[0], dequantized(blocks)[:, 3].astype(np.float32))


def test_quantizing_is_that_of_the_format() -> None:
    weights = normal(1, 70, 96)
    weights[3], weights[4] = 0, 1e-6 * weights[4]  # a scale of zero, and scales among the least of float16
    weights[5, 0] = 127 * 2.0**-3  # a scale that is exact: halves are exact too, and must go away from zero
    weights[5, 1:32] = (np.arange(31) - 15.5) * 2.0**-3
    memory = np.zeros(LIB.packed_bytes("q8_0", 96, 70), np.uint8)
    LIB.pack(weights.T, memory, "q8_0")
    np.testing.assert_array_equal(memory, packed(quantized(weights)))


def test_what_does_not_fit_is_refused() -> None:
    x, y, weights = normal(1, 2, 32), np.empty((2, 4), np.float32), packed(quantized(normal(2, 4, 32)))
    with pytest.raises(ValueError, match="expected 1088"):
        LIB.matmul(x, weights[:-1], y, "q8_0")
    with pytest.raises(ValueError, match="multiple of 32"):
        LIB.matmul(normal(1, 2, 40), weights, y, "q8_0")
    with pytest.raises(ValueError, match="multiple of 32"):
        LIB.pack(normal(1, 40, 4), weights, "q8_0")
    with pytest.raises(ValueError, match="uint8 for float32"):
        LIB.pack(quantized(normal(2, 4, 32)), np.zeros(LIB.packed_bytes("float32", 32, 4), np.uint8), "float32")
