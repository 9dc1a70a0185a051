"""The matmuls of quantized weights against the `gguf` package and float64, for every instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import gguf
import numpy as np
import pytest

from max.compiler.native import BLOCKS, ISAS, Epilogue, Library, QuantizedEncoding, library
from max.compiler.weights import packed_shape, packing_of, packs

KERNELS = library()
if KERNELS is None:
    pytest.skip("the package was installed without a C++ compiler", allow_module_level=True)
assert KERNELS is not None
LIB: Library = KERNELS

ENCODINGS: tuple[QuantizedEncoding, ...] = get_args(QuantizedEncoding)
TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ENCODINGS}
GATED: tuple[Epilogue, ...] = ("swiglu", "geglu_tanh", "geglu_erf")


@pytest.fixture(params=[isa for isa in ISAS if LIB.supports(isa)])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    LIB.select(request.param)
    yield request.param
    LIB.select("")
    LIB.set_num_threads(0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def any_blocks(encoding: QuantizedEncoding, seed: int, outputs: int, inputs: int) -> np.ndarray:
    """Blocks of every code, scale and minimum that a file may hold, with float16 scales around 2**-10."""
    block, nbytes = BLOCKS[encoding]
    blocks = np.random.default_rng(seed).integers(0, 256, (outputs, inputs // block, nbytes), np.uint8)
    halves = {"q8_0": (0,), "q4_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}[encoding]
    for at in halves:
        scales = (normal(seed + at, *blocks.shape[:2]) * 2.0**-10).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(outputs, -1)


def dequantized(encoding: QuantizedEncoding, blocks: np.ndarray) -> np.ndarray:
    """(outputs, inputs) float64."""
    return gguf.dequantize(blocks, TYPES[encoding]).astype(np.float64)


def packed(encoding: QuantizedEncoding, *parts: np.ndarray) -> np.ndarray:
    """Blocks of one matrix, or of gate and up, in panels."""
    block, nbytes = BLOCKS[encoding]
    outputs, inputs = len(parts[0]), parts[0].shape[1] // nbytes * block
    memory = np.zeros(LIB.packed_bytes(encoding, inputs, outputs, gated=len(parts) == 2), np.uint8)
    for part, columns in zip(parts, ("gate", "up") if len(parts) == 2 else ("plain",), strict=True):
        LIB.pack(part, memory, encoding, columns=columns)
    return memory


def rounded_inputs(x: np.ndarray) -> np.ndarray:
    """x as the kernels multiply it: int8 in blocks of 32 with a float32 scale; float64."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        per_unit = np.where(largest > 1e-30, np.float32(127) / largest, np.float32(0))
    values = np.rint(blocks * per_unit).astype(np.float64)
    return (values * (largest / np.float32(127))).reshape(x.shape)


def product(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x @ weights.T, and how far sums in float32 may be from it: those of a block are exact, q4_k adds its minimum."""
    # q4_k subtracts numbers larger than their difference: at most 15 and 63 times the scales.
    return x @ weights.T, 2.0**-23 * (x.shape[1] / 8 + 4) * (np.abs(x) @ np.abs(weights).T)


SHAPES = [(1, 256, 1), (1, 768, 33), (2, 256, 64), (5, 512, 31), (8, 256, 33), (13, 256, 100), (131, 768, 45), (257, 256, 7)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_matmul_is_that_of_the_dequantized_weights(isa: str, encoding, rows: int, inputs: int, outputs: int) -> None:
    x, weights, bias = normal(1, rows, inputs), any_blocks(encoding, 2, outputs, inputs), normal(4, outputs)
    want, error = product(rounded_inputs(x), dequantized(encoding, weights))
    error += 2.0**-20 * np.abs(want)
    y = np.full((rows, outputs), np.nan, np.float32)
    LIB.matmul(x, packed(encoding, weights), y, encoding)
    assert np.all(np.abs(y - want) <= error)
