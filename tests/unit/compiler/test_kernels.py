"""The packed matmuls against float64, for every instruction set of this CPU, and the bits of each row."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from math import erfc
from pathlib import Path
from typing import get_args

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from max import ConfigError
from max.compiler import native
from max.compiler.native import HANDLERS, HINTS, HINTS_VARIABLE, ISA_VARIABLE, ISAS, Library, library, library_path
from max.compiler.native_functions import Encoding, Epilogue

ENCODINGS: tuple[Encoding, ...] = ("float32", "bfloat16")
GATED: tuple[Epilogue, ...] = ("swiglu", "geglu_tanh", "geglu_erf")
EPILOGUES: tuple[Epilogue, ...] = get_args(Epilogue)
KERNELS = library()
SUPPORTED = [isa for isa in ISAS if KERNELS is not None and KERNELS.supports(isa)]
NEWEST = SUPPORTED[-1:]

if KERNELS is None:
    pytest.skip("the package was installed without a C++ compiler", allow_module_level=True)
assert KERNELS is not None
LIB: Library = KERNELS


@pytest.fixture(params=SUPPORTED)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    LIB.select(request.param)
    yield request.param
    LIB.select("")
    LIB.set_num_threads(0)


def rounded(array: np.ndarray, encoding: Encoding) -> np.ndarray:
    """float64 values of what the encoding keeps."""
    kept = array.astype(ml_dtypes.bfloat16) if encoding == "bfloat16" else array
    return kept.astype(np.float64)


def packed(weights: list[np.ndarray], encoding: Encoding) -> np.ndarray:
    """One (outputs, inputs) matrix, or gate and up, in panels."""
    outputs, inputs = weights[0].shape
    memory = np.zeros(LIB.packed_bytes(encoding, inputs, outputs, gated=len(weights) == 2), np.uint8)
    if len(weights) == 1:
        LIB.pack(weights[0].T, memory, encoding)
    else:
        LIB.pack(weights[0].T, memory, encoding, columns="gate")
        LIB.pack(weights[1].T, memory, encoding, columns="up")
    return memory


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x @ weights.T, and how far a float32 sum in any order may be from it."""
    unit = 2.0**-23
    return x @ weights.T, unit * (x.shape[1] + 2) * (np.abs(x) @ np.abs(weights).T)


def activated(epilogue: Epilogue, gate: np.ndarray) -> np.ndarray:
    """In float64, as written in the papers; GELU's tails by erfc, which does not cancel."""
    if epilogue == "swiglu":
        return gate / (1 + np.exp(-gate))
    if epilogue == "geglu_tanh":
        return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return gate / 2 * np.vectorize(erfc)(-gate / np.sqrt(2))


def check(isa: str, encoding: Encoding, epilogue: Epilogue, rows: int, inputs: int, outputs: int) -> None:
    x = normal(1, rows, inputs)
    weights = [normal(2, outputs, inputs), normal(3, outputs, inputs)][: 2 if epilogue in GATED else 1]
    bias = normal(4, outputs) if epilogue == "bias" else None
    y = np.full((rows, outputs), np.nan, np.float32)
    LIB.matmul(x, packed(weights, encoding), y, encoding, epilogue=epilogue, bias=bias)
    # Only that instruction set multiplies two bfloat16; the others widen the weight.
    x64 = rounded(x, "bfloat16" if encoding == "bfloat16" and isa == "avx512_bf16" else "float32")
    want, error = product(x64, rounded(weights[0], encoding))
    if bias is not None:
        want = want + bias
        error = error + 2.0**-23 * np.abs(want)
    if epilogue in GATED:
        up, up_error = product(x64, rounded(weights[1], encoding))
        gate = activated(epilogue, want)
        want, error = gate * up, np.abs(gate) * up_error + 1.2 * error * (np.abs(up) + up_error)
        error = error + 2.0**-20 * np.abs(want)
    assert np.all(np.abs(y - want) <= error)


@pytest.mark.quick(isa=NEWEST)
@pytest.mark.quick(rows=[13])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 1, 1),
        (1, 64, 32),
        (1, 129, 31),
        (2, 7, 33),
        (12, 64, 96),
        (13, 100, 17),
        (97, 31, 65),
        (257, 40, 50),
        (17, 512, 33),
    ],
)
def test_a_matmul_is_that_of_float64(isa: str, encoding: Encoding, epilogue: Epilogue, rows, inputs, outputs) -> None:
    check(isa, encoding, epilogue, rows, inputs, outputs)


@settings(max_examples=settings().max_examples * 3 // 5, derandomize=True)
@given(
    isa=st.sampled_from(SUPPORTED),
    encoding=st.sampled_from(ENCODINGS),
    epilogue=st.sampled_from(EPILOGUES),
    rows=st.integers(1, 257),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 150),
)
def test_a_matmul_of_any_shape(isa: str, encoding: Encoding, epilogue: Epilogue, rows, inputs, outputs) -> None:
    LIB.select(isa)
    try:
        check(isa, encoding, epilogue, rows, inputs, outputs)
    finally:
        LIB.select("")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_rows_and_no_inputs(isa: str, encoding: Encoding) -> None:
    LIB.matmul(
        np.empty((0, 5), np.float32), packed([normal(1, 3, 5)], encoding), np.empty((0, 3), np.float32), encoding
    )
    y = np.full((2, 3), np.nan, np.float32)
    LIB.matmul(np.empty((2, 0), np.float32), packed([np.empty((3, 0), np.float32)], encoding), y, encoding)
    assert not y.any()


@pytest.mark.quick(isa=NEWEST, inputs=[77])
@pytest.mark.quick(epilogue=["none"], inputs=[77])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("inputs", [77, 512])
def test_a_row_has_the_same_bits_in_every_batch_and_on_any_threads(
    isa: str, encoding: Encoding, epilogue: Epilogue, inputs: int
) -> None:
    rows, outputs = 230, 203
    x = normal(1, rows, inputs)
    # A row that overflows or is not a number is its own problem only.
    x[5], x[9] = np.nan, 3e38
    weights = packed(
        [normal(2, outputs, inputs), normal(3, outputs, inputs)][: 2 if epilogue in GATED else 1], encoding
    )
    bias = normal(4, outputs) if epilogue == "bias" else None
    LIB.set_num_threads(1)
    alone = np.empty((rows, outputs), np.float32)
    for row in range(rows):
        LIB.matmul(x[row : row + 1], weights, alone[row : row + 1], encoding, epilogue=epilogue, bias=bias)
    for threads in (1, 2, 5):
        LIB.set_num_threads(threads)
        for batch in (2, 3, 7, 12, 13, 25, 96, 97, 230):
            y = np.empty((batch, outputs), np.float32)
            first = rows - batch
            LIB.matmul(x[first:], weights, y, encoding, epilogue=epilogue, bias=bias)
            np.testing.assert_array_equal(y.view(np.int32), alone[first:].view(np.int32))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_columns_packed_in_parts_are_the_fused_matrix(encoding: Encoding, dtype: type) -> None:
    whole = normal(1, 45, 100).astype(dtype)
    parts = np.zeros(LIB.packed_bytes(encoding, 45, 100), np.uint8)
    for first, last in ((0, 40), (40, 41), (41, 100)):
        LIB.pack(whole[:, first:last], parts, encoding, first_column=first, total_columns=100)
    fused = np.zeros_like(parts)
    LIB.pack(np.asfortranarray(whole), fused, encoding)
    np.testing.assert_array_equal(parts, fused)
    # The layout itself, which prepared weights keep on disk: panels of 32 columns, bfloat16 in pairs of inputs.
    pairs = 1 if encoding == "float32" else 2
    padded = np.pad(whole.astype(encoding), ((0, 45 % pairs), (0, 28)))
    layout = padded.reshape(-1, pairs, 4, 32).transpose(2, 0, 3, 1)
    np.testing.assert_array_equal(fused, np.ascontiguousarray(layout).view(np.uint8).ravel())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gate_and_up_alternate_by_sixteen_columns(encoding: Encoding) -> None:
    gate, up = normal(1, 40, 6), normal(2, 40, 6)
    mixed = np.zeros((96, 6), np.float32)
    for first in (0, 16, 32):
        size = min(16, 40 - first)
        mixed[2 * first : 2 * first + size] = gate[first : first + size]
        mixed[2 * first + 16 : 2 * first + 16 + size] = up[first : first + size]
    np.testing.assert_array_equal(packed([gate, up], encoding), packed([mixed], encoding))


def test_rounding_to_bfloat16_is_that_of_ml_dtypes() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (1000, 32), np.uint32)
    values = bits.view(np.float32)
    values[~np.isfinite(values)] = 3.4e38
    memory = np.zeros(LIB.packed_bytes("bfloat16", 1000, 32), np.uint8)
    LIB.pack(values, memory, "bfloat16")
    with np.errstate(over="ignore"):
        want = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(
        memory.view(np.uint16).reshape(500, 32, 2), want.reshape(500, 2, 32).transpose(0, 2, 1)
    )


@pytest.mark.quick(isa=NEWEST)
@pytest.mark.quick(columns=[17, 1025])
@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 1023, 1024, 1025, 5000, 1 << 18])
def test_argmax_is_that_of_numpy_and_minus_one_in_rows_with_a_nan(isa: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    few = rng.integers(-3, 3, (40, columns)).astype(np.float32)  # so that many are equal
    for x in (few, normal(1, 7, columns), np.full((2, columns), -np.inf, np.float32)):
        np.testing.assert_array_equal(LIB.argmax(x), x.argmax(axis=1))
    few[np.arange(0, 40, 3), rng.integers(0, columns, 14)] = np.inf
    few[np.arange(0, 40, 2), rng.integers(0, columns, 20)] = np.nan
    np.testing.assert_array_equal(LIB.argmax(few), np.where(np.isnan(few).any(axis=1), -1, few.argmax(axis=1)))


def test_argmax_needs_columns_but_no_rows() -> None:
    assert LIB.argmax(np.empty((0, 5), np.float32)).shape == (0,)
    with pytest.raises(ValueError, match="rows have 1 to"):
        LIB.argmax(np.empty((2, 0), np.float32))


def test_wrong_sizes_are_refused() -> None:
    x, weights, y = normal(1, 2, 8), packed([normal(2, 4, 8)], "float32"), np.empty((2, 4), np.float32)
    with pytest.raises(ValueError, match="expected 1024"):
        LIB.matmul(x, weights[:-4], y, "float32")
    with pytest.raises(ValueError, match="packed weights have 1024 bytes"):
        LIB.matmul(x, weights, y, "bfloat16")
    with pytest.raises(ValueError, match="contiguous"):
        LIB.matmul(normal(1, 8, 2).T, weights, y, "float32")
    with pytest.raises(ValueError, match="do not fit"):
        LIB.pack(normal(1, 8, 40), weights, "float32")
    with pytest.raises(ValueError, match="the columns"):
        LIB.pack(normal(1, 8, 4), weights, "float32", first_column=1, total_columns=4)
    with pytest.raises(ValueError, match="float64"):
        LIB.pack(normal(1, 8, 4).astype(np.float64), weights, "float32")


def test_the_variable_forces_an_instruction_set() -> None:
    code = "from max.compiler.native import library; print(library().isa)"
    for name in (*SUPPORTED, "mmx"):
        environment = {**os.environ, ISA_VARIABLE: name}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
        assert done.stdout.strip() == (name if name in SUPPORTED else "")
        assert ("no instruction set 'mmx'" in done.stderr) == (name == "mmx")


def test_the_library_is_that_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout may hold one of another Python too, older than its sources."""
    built = library_path()
    assert built is not None
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "_kernels.cpython-300-x86_64-linux-gnu.so").touch()
    assert library_path() is None
    (tmp_path / built.name).touch()
    assert library_path() == tmp_path / built.name


def test_an_unknown_instruction_set_is_refused_with_the_possible_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        LIB.select("avx1024")
    assert "avx1024" in caught.value.message and "baseline" in caught.value.hint
    assert LIB.isa in SUPPORTED


def test_threads_are_those_of_the_process_unless_set() -> None:
    assert LIB.num_threads == len(os.sched_getaffinity(0))
    LIB.set_num_threads(3)
    assert LIB.num_threads == 3
    LIB.set_num_threads(0)


_WITHOUT_ROOM = """
import resource
import numpy as np
from max.compiler.native import library

kernels = library()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
kernels.set_num_threads(1000)
for rows in (1, 300):
    x, ids = np.eye(rows, 5000, dtype=np.float32), np.arange(rows)
    assert (kernels.argmax(x) == ids).all()
print(sum(1 for line in open("/proc/self/status") if line.startswith("Threads:\\t") and int(line.split()[1]) < 1000))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the memory in use is told by Linux")
def test_where_threads_cannot_be_made_fewer_compute() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT_ROOM], cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_the_library_needs_no_jax() -> None:
    code = "import sys; from max.compiler.native import library; library().handlers(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


@pytest.fixture(scope="module")
def registered() -> None:
    for name, handler in LIB.handlers().items():
        jax.ffi.register_ffi_target(f"tested_{name}", handler, platform="cpu")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_xla_calls_the_matmul(encoding: Encoding, epilogue: Epilogue) -> None:
    x, weights = normal(1, 3, 20), [normal(2, 7, 20), normal(3, 7, 20)][: 2 if epilogue in GATED else 1]
    bias = [normal(4, 7)] if epilogue == "bias" else []
    name = f"tested_max_matmul_{'f32' if encoding == 'float32' else 'bf16'}_v2"
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((3, 7), np.float32))
    blocks = packed(weights, encoding).reshape(-1, 4 if encoding == "float32" else 2)
    y = jax.jit(lambda *a: call(*a, epilogue=np.int64(EPILOGUES.index(epilogue))))(x, blocks, *bias)
    want = np.empty((3, 7), np.float32)
    LIB.matmul(x, packed(weights, encoding), want, encoding, epilogue=epilogue, bias=bias[0] if bias else None)
    np.testing.assert_array_equal(y, want)


@pytest.mark.usefixtures("registered")
def test_xla_calls_the_argmax() -> None:
    x = normal(1, 5, 3000)
    result = jax.jit(jax.ffi.ffi_call("tested_max_argmax_v2", jax.ShapeDtypeStruct((5,), np.int32)))(x)
    np.testing.assert_array_equal(result, x.argmax(axis=1))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("encoding", ["float32", "bfloat16"])
def test_rows_that_are_looked_up_have_the_bits_that_were_packed(encoding: Encoding, threads: int) -> None:
    for inputs, outputs in ((1, 1), (7, 32), (64, 33), (129, 100)):
        table = normal(3, outputs, inputs)
        table.ravel()[:3] = (np.inf, -0.0, 1e-39)[: table.size]
        if encoding == "bfloat16":
            table = table.astype(ml_dtypes.bfloat16).astype(np.float32)
        ids = np.concatenate([np.arange(outputs), [0, outputs - 1, outputs, -1, 2**31 - 1]]).astype(np.int32)
        rows = np.zeros((len(ids), inputs), np.float32)
        try:
            LIB.set_num_threads(threads)
            LIB.embed(ids, packed([table], encoding), outputs, rows, encoding)
        finally:
            LIB.set_num_threads(0)
        assert rows[:-3].tobytes() == table[ids[:-3]].tobytes()
        assert np.isnan(rows[-3:]).all()


@pytest.mark.usefixtures("registered")
def test_xla_looks_rows_up() -> None:
    table, ids = normal(3, 50, 64), np.array([49, 0, 7], np.int32)
    embed = jax.ffi.ffi_call("tested_max_embed_v1", jax.ShapeDtypeStruct((3, 64), np.float32))

    def call(weights: np.ndarray, outputs: int) -> jax.Array:
        return jax.jit(lambda *arguments: embed(*arguments, outputs=np.int64(outputs)))(ids, weights)

    weights = packed([table], "float32").reshape(-1, 4)
    np.testing.assert_array_equal(call(weights, 50), table[ids])
    for blocks, outputs, message in (
        (weights, 65, "expected"),
        (weights.reshape(-1, 8), 50, "blocks of 8 bytes"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(call(blocks, outputs))


@pytest.mark.usefixtures("registered")
def test_xla_reports_what_is_wrong() -> None:
    call = jax.ffi.ffi_call("tested_max_matmul_f32_v2", jax.ShapeDtypeStruct((3, 7), np.float32))
    x, weights = normal(1, 3, 20), packed([normal(2, 7, 20)], "float32").reshape(-1, 4)
    for arguments, epilogue, message in (
        ((x, weights[1:]), 0, "expected 2560 for 20 inputs and 7 outputs"),
        ((x, weights.reshape(-1, 2)), 0, "4. bytes in float32"),
        ((x, weights.ravel()), 0, "4. bytes in float32"),
        ((x, weights), 1, "bias"),
        ((x, weights, normal(1, 6)), 1, "one element per output"),
        ((x, weights), 7, "epilogue"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(jax.jit(lambda *a, e=epilogue: call(*a, epilogue=np.int64(e)))(*arguments))


def test_every_handler_is_in_the_library() -> None:
    path = library_path()
    assert path is not None and path.parent == Path(sys.modules[Library.__module__].__file__ or "").parent
    assert sorted(LIB.handlers()) == sorted(HANDLERS)


def test_hints_at_weights_to_come_never_change_bits() -> None:
    """Each kind in a process of its own, as the kind is chosen once."""
    program = (
        "import hashlib, sys, numpy as np\n"
        "from typing import get_args\n"
        "from max.compiler.native import library\n"
        "from max.compiler.native_functions import Encoding\n"
        "lib = library(); rng = np.random.default_rng(0); digest = hashlib.sha256()\n"
        "for encoding in get_args(Encoding):\n"
        "    w = rng.standard_normal((256, 96), np.float32)\n"
        "    packed = np.zeros(lib.packed_bytes(encoding, 256, 96), np.uint8)\n"
        "    lib.pack(w, packed, encoding)\n"
        "    for rows in (1, 2, 3, 4, 8, 12, 13):\n"
        "        y = np.empty((rows, 96), np.float32)\n"
        "        lib.matmul(rng.standard_normal((rows, 256), np.float32), packed, y, encoding)\n"
        "        digest.update(y.tobytes())\n"
        "print(digest.hexdigest())\n"
    )

    def digest(hints: str) -> str:
        environment = {**os.environ, HINTS_VARIABLE: hints}
        return subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)

    assert len({digest(hints) for hints in HINTS}) == 1


def test_hints_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = library_path()
    assert built is not None
    monkeypatch.setenv(HINTS_VARIABLE, "third")
    with pytest.raises(ConfigError, match="MAX_KERNELS_HINTS is 'third'"):
        Library(built)
