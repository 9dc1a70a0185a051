"""The matmuls of quantized weights against the `gguf` package and float64, for every instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from math import erfc
from typing import get_args

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from max.compiler.native import ISAS, Library, library
from max.compiler.native_functions import Epilogue
from max.compiler.native_packing import BLOCKS, QuantizedEncoding
from max.compiler.panels import packed_shape, packing_of, packs

KERNELS = library()
if KERNELS is None:
    pytest.skip("the package was installed without a C++ compiler", allow_module_level=True)
assert KERNELS is not None
LIB: Library = KERNELS

ENCODINGS: tuple[QuantizedEncoding, ...] = get_args(QuantizedEncoding)
TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ENCODINGS}
GATED: tuple[Epilogue, ...] = ("swiglu", "geglu_tanh", "geglu_erf")


SUPPORTED = [isa for isa in ISAS if LIB.supports(isa)]
NEWEST = SUPPORTED[-1:]


@pytest.fixture(params=SUPPORTED)
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
    blocks = x.reshape(len(x), x.shape[1] // 32, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        per_unit = np.where(largest > 1e-30, np.float32(127) / largest, np.float32(0))
    values = np.rint(blocks * per_unit).astype(np.float64)
    return (values * (largest / np.float32(127))).reshape(x.shape)


def product(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x @ weights.T, and how far sums in float32 may be from it: those of a block are exact, q4_k adds its minimum."""
    # q4_k subtracts numbers larger than their difference: at most 15 and 63 times the scales.
    return x @ weights.T, 2.0**-23 * (x.shape[1] / 8 + 4) * (np.abs(x) @ np.abs(weights).T)


def bits_of(y: np.ndarray) -> bytes:
    """A NaN's own bits are nobody's business."""
    return np.where(np.isnan(y), np.float32(np.nan), y).tobytes()


SHAPES = [
    (1, 256, 1),
    (1, 768, 33),
    (2, 256, 64),
    (5, 512, 31),
    (8, 256, 33),
    (13, 256, 100),
    (131, 768, 45),
    (257, 256, 7),
]


@pytest.mark.quick(isa=NEWEST)
@pytest.mark.quick(rows=[13])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_matmul_is_that_of_the_dequantized_weights(isa: str, encoding, rows: int, inputs: int, outputs: int) -> None:
    check(encoding, rows, inputs, outputs)


def check(encoding: QuantizedEncoding, rows: int, inputs: int, outputs: int) -> None:
    x, weights = normal(1, rows, inputs), any_blocks(encoding, 2, outputs, inputs)
    want, error = product(rounded_inputs(x), dequantized(encoding, weights))
    error += 2.0**-20 * np.abs(want)
    y = np.full((rows, outputs), np.nan, np.float32)
    LIB.matmul(x, packed(encoding, weights), y, encoding)
    assert np.all(np.abs(y - want) <= error)


@settings(max_examples=settings().max_examples * 3 // 5, derandomize=True)
@given(
    isa=st.sampled_from(SUPPORTED),
    encoding=st.sampled_from(ENCODINGS),
    rows=st.integers(0, 257),
    blocks=st.integers(1, 9),
    outputs=st.integers(1, 150),
)
def test_a_matmul_of_any_shape(isa: str, encoding: QuantizedEncoding, rows: int, blocks: int, outputs: int) -> None:
    """Widths of q8_0 and q4_0 that are no multiples of 256 too."""
    LIB.select(isa)
    try:
        check(encoding, rows, blocks * BLOCKS[encoding][0], outputs)
    finally:
        LIB.select("")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_epilogues_are_those_of_the_product(isa: str, encoding: QuantizedEncoding) -> None:
    x, outputs = normal(1, 9, 256), 45
    gate, up, bias = any_blocks(encoding, 2, outputs, 256), any_blocks(encoding, 3, outputs, 256), normal(4, outputs)
    gate_product, up_product, y = (np.empty((9, outputs), np.float32) for _ in range(3))
    LIB.matmul(x, packed(encoding, gate), gate_product, encoding)
    x *= 2 / gate_product.std()  # gates of which the activations neither overflow nor vanish
    LIB.matmul(x, packed(encoding, gate), gate_product, encoding)
    LIB.matmul(x, packed(encoding, up), up_product, encoding)
    LIB.matmul(x, packed(encoding, gate), y, encoding, epilogue="bias", bias=bias)
    np.testing.assert_array_equal(y, gate_product + bias)
    z = gate_product.astype(np.float64)
    tanh = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    erf = z / 2 * np.vectorize(erfc)(-z / np.sqrt(2))
    for epilogue, activated in zip(GATED, (z / (1 + np.exp(-z)), tanh, erf), strict=True):
        y[...] = np.nan
        LIB.matmul(x, packed(encoding, gate, up), y, encoding, epilogue=epilogue)
        np.testing.assert_allclose(y, activated * up_product, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_row_has_the_same_bits_in_every_batch_and_on_any_threads(isa: str, encoding: QuantizedEncoding) -> None:
    rows, outputs = 230, 75
    x, weights = normal(1, rows, 768), packed(encoding, any_blocks(encoding, 2, outputs, 768))
    x[5, 3], x[9] = np.nan, 3e38  # a row that overflows or is not a number is its own problem only
    x[11, 32:64], x[12, 64:] = 0, 1e-39
    LIB.set_num_threads(1)
    alone = np.empty((rows, outputs), np.float32)
    for row in range(rows):
        LIB.matmul(x[row : row + 1], weights, alone[row : row + 1], encoding)
    assert np.isnan(alone[5]).all() and np.isfinite(np.delete(alone, (5, 9), 0)).all()
    for threads in (1, 2, 5):
        LIB.set_num_threads(threads)
        for batch in (2, 3, 7, 8, 9, 13, 96, 192, 230):
            y, first = np.empty((batch, outputs), np.float32), rows - batch
            LIB.matmul(x[first:], weights, y, encoding)
            assert bits_of(y) == bits_of(alone[first:])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_weight_is_that_of_the_gguf_package(isa: str, encoding: QuantizedEncoding) -> None:
    """A single input of 127 is rounded exactly, so that the result is the weight, 127 times."""
    inputs, outputs = 512, 40
    blocks = any_blocks(encoding, 7, outputs, inputs)
    y = np.empty((inputs, outputs), np.float32)
    LIB.matmul(np.float32(127) * np.eye(inputs, dtype=np.float32), packed(encoding, blocks), y, encoding)
    weights = dequantized(encoding, blocks).T
    if encoding == "q4_k":  # two products, of which the difference is rounded once more
        np.testing.assert_allclose(y / 127, weights, rtol=2.0**-22, atol=2.0**-22 * np.abs(weights).max())
    else:
        np.testing.assert_array_equal(y, (127 * weights).astype(np.float32))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_row_that_is_looked_up_is_that_of_the_gguf_package(encoding: QuantizedEncoding) -> None:
    outputs, inputs = 77, 512
    blocks = any_blocks(encoding, 7, outputs, inputs)
    ids = np.random.default_rng(1).permutation(outputs).astype(np.int32)
    rows = np.full((outputs, inputs), np.nan, np.float32)
    LIB.embed(ids, packed(encoding, blocks), outputs, rows, encoding)
    np.testing.assert_array_equal(rows, gguf.dequantize(blocks, TYPES[encoding])[ids])


@pytest.mark.quick(isa=NEWEST)
@pytest.mark.parametrize("encoding", ["q8_0", "q4_0"])
def test_every_finite_scale_is_read_exactly(isa: str, encoding: QuantizedEncoding) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    codes = np.zeros((len(bits), BLOCKS[encoding][1] - 2), np.uint8)
    codes[:, 3] = np.arange(len(bits)) % 256
    blocks = np.concatenate([bits.view(np.uint8).reshape(-1, 2), codes], axis=1)
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = 127
    y = np.empty((1, len(bits)), np.float32)
    LIB.matmul(x, packed(encoding, blocks), y, encoding)
    np.testing.assert_array_equal(y[0], (127 * dequantized(encoding, blocks)[:, 3]).astype(np.float32))


def test_quantizing_to_q8_0_and_q4_0_is_that_of_the_gguf_package(isa: str) -> None:
    weights = normal(1, 70, 96)
    weights[3], weights[4] = 0, 1e-6 * weights[4]  # a scale of zero, and scales among the least of float16
    weights[5, 0] = 127 * 2.0**-3  # a scale that is exact: halves are exact too, and must go away from zero
    weights[5, 1:32] = (np.arange(31) - 15.5) * 2.0**-3
    weights[6, ::2], weights[6, 1::2] = 2.0, -2.0  # of equal magnitudes the first counts
    for encoding in ("q8_0", "q4_0"):
        want = gguf.quantize(weights, TYPES[encoding])
        np.testing.assert_array_equal(LIB.quantize(weights, encoding), want)


def plain_errors(weights: np.ndarray, encoding: QuantizedEncoding) -> np.ndarray:
    """Of weights rounded to the range of each block with scales that need not be rounded, by themselves or by 63rds."""
    size, levels = (32, 15) if encoding == "q4_k" else (16, 31)
    blocks = weights.reshape(-1, size).astype(np.float64)
    if encoding == "q4_k":
        low = np.minimum(blocks.min(axis=1, keepdims=True), 0)
        scale = np.maximum((blocks.max(axis=1, keepdims=True) - low) / levels, 1e-300)
    else:
        low, scale = 0, np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / levels, 1e-300)
    return (np.rint((blocks - low) / scale) * scale + low - blocks).reshape(weights.shape)


@pytest.mark.parametrize("encoding", ["q4_k", "q6_k"])
@pytest.mark.parametrize(
    "kind", ["normal", "uniform", "heavy", "positive", "sparse", "constant", "zero", "tiny", "large"]
)
def test_quantizing_to_super_blocks_is_no_worse_than_each_block_s_range(encoding: QuantizedEncoding, kind: str) -> None:
    x = normal(3, 16, 512)
    uniform = np.random.default_rng(3).uniform(-1, 1, x.shape).astype(np.float32)
    weights = {
        "normal": x,
        "uniform": uniform,
        "heavy": x**3,
        "positive": np.abs(x) + 1,
        "sparse": np.where(uniform > 0.9, x, 0),
        "constant": np.full_like(x, -0.37),
        "zero": np.zeros_like(x),
        "tiny": x * 2.0**-12,
        "large": x * 2.0**12,
    }[kind]
    got = gguf.dequantize(LIB.quantize(weights, encoding), TYPES[encoding])
    plain = np.sqrt(np.mean(plain_errors(weights, encoding) ** 2))
    error = np.sqrt(np.mean((got.astype(np.float64) - weights) ** 2))
    assert error <= 1.02 * plain + 2e-3 * np.abs(weights).mean()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_blocks_are_the_same_bits_on_every_instruction_set_and_on_any_threads(encoding: QuantizedEncoding) -> None:
    x = normal(5, 12, 512)
    weights = np.concatenate([x * 0.02, x**3, np.abs(x) + 1, np.rint(4 * x) / 8, x * 2.0**-30, 0 * x])
    try:
        made = set()
        for isa in (isa for isa in ISAS if LIB.supports(isa)):
            LIB.select(isa)
            for threads in (1, 3):
                LIB.set_num_threads(threads)
                made.add(LIB.quantize(weights, encoding).tobytes())
        assert len(made) == 1
    finally:
        LIB.select("")
        LIB.set_num_threads(0)


def test_packing_elements_is_packing_their_blocks() -> None:
    for encoding in ENCODINGS:
        weights = normal(1, 45, 512)
        memory = np.zeros(LIB.packed_bytes(encoding, 512, 45), np.uint8)
        for first, last in ((0, 7), (7, 45)):
            LIB.pack(weights[first:last].T, memory, encoding, first_column=first, total_columns=45)
        np.testing.assert_array_equal(memory, packed(encoding, LIB.quantize(weights, encoding)))


def test_the_shape_of_packed_weights_tells_their_encoding() -> None:
    for encoding in ENCODINGS:
        shape = packed_shape(encoding, 512, 100)
        assert packing_of(shape) == encoding and np.prod(shape) == LIB.packed_bytes(encoding, 512, 100)
        assert packs(encoding, 512) and not packs(encoding, 48)


def test_what_does_not_fit_is_refused() -> None:
    x, y = normal(1, 2, 256), np.empty((2, 4), np.float32)
    for encoding in ENCODINGS:
        block, nbytes = BLOCKS[encoding]
        blocks = any_blocks(encoding, 2, 4, 256)
        weights = packed(encoding, blocks)
        with pytest.raises(ValueError, match=f"expected {weights.nbytes}"):
            LIB.matmul(x, weights[:-1], y, encoding)
        with pytest.raises(ValueError, match=f"expected {weights.nbytes}"):
            LIB.embed(np.zeros(2, np.int32), weights[:-1], 4, np.empty((2, 256), np.float32), encoding)
        with pytest.raises(ValueError, match="whole blocks"):
            LIB.embed(np.zeros(2, np.int32), weights, 4, np.empty((2, 248), np.float32), encoding)
        with pytest.raises(ValueError, match=f"multiple of {block}"):
            LIB.matmul(normal(1, 2, 248), weights, y, encoding)
        with pytest.raises(ValueError, match=f"multiple of {block}"):
            LIB.pack(normal(1, 248, 4), weights, encoding)
        with pytest.raises(ValueError, match=f"multiple of {block}"):
            LIB.quantize(normal(1, 4, 248), encoding)
        with pytest.raises(ValueError, match=f"blocks of {nbytes} bytes"):
            LIB.pack(np.zeros((4, nbytes - 1), np.uint8), weights, encoding)
        with pytest.raises(ValueError, match="uint8 for float32"):
            LIB.pack(blocks, np.zeros(LIB.packed_bytes("float32", 256, 4), np.uint8), "float32")
