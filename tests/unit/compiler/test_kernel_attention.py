"""The attention kernel against a dense float64 attention, for every instruction set, and the bits of each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from max.compiler.native import ISAS, Library, library
from max.models.kernels import MAX_HEAD_DIM, why_no_attention

KERNELS = library()
if KERNELS is None:
    pytest.skip("the package was installed without a C++ compiler", allow_module_level=True)
assert KERNELS is not None
LIB: Library = KERNELS
SUPPORTED = [isa for isa in ISAS if LIB.supports(isa)]
NEWEST = SUPPORTED[-1:]


@pytest.fixture(params=SUPPORTED)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    LIB.select(request.param)
    yield request.param
    LIB.select("")
    LIB.set_num_threads(0)


_BLOCK = 64


def laid_out(pages: np.ndarray) -> np.ndarray:
    """Pages (P, 2, K, page_tokens, H) as the kernel keeps them: the keys of 64 tokens lie as [H][tokens]."""
    return _turned(pages, back=False)


def read_back(pages: np.ndarray) -> np.ndarray:
    """The pages of which `laid_out` makes these."""
    return _turned(pages, back=True)


def _turned(pages: np.ndarray, *, back: bool) -> np.ndarray:
    turned = pages.copy()
    for first in range(0, pages.shape[3], _BLOCK):
        block = pages[:, 0, :, first : first + _BLOCK]
        num_pages, heads, tokens, dim = block.shape
        turned[:, 0, :, first : first + _BLOCK] = (
            block.reshape(num_pages, heads, dim, tokens).swapaxes(2, 3)
            if back
            else block.swapaxes(2, 3).reshape(block.shape)
        )
    return turned


@dataclass
class Step:
    """A ragged step over pages as people read them, of which all that no row has written is NaN."""

    heads: int
    qkv: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    pages: np.ndarray
    table: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    softcap: float = 0.0
    window: int = 0
    sinks: np.ndarray | None = None

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """The output, and the pages afterwards."""
        pages = laid_out(self.pages)
        head_dim = pages.shape[4]
        out = np.full((len(self.rows), self.heads * head_dim), np.nan, np.float32)
        tokens = (self.rows, self.positions, self.slots)
        LIB.attention(
            self.qkv, self.cos, self.sin, pages, self.table, *tokens, out,
            scale=head_dim**-0.5, softcap=self.softcap, window=self.window, sinks=self.sinks,
        )  # fmt: skip
        return out, read_back(pages)

    def part(self, first: int, last: int, pages: np.ndarray) -> Step:
        """The tokens [first, last) as a step of their own."""
        tokens = {name: getattr(self, name)[first:last] for name in ("qkv", "cos", "sin", "rows", "positions", "slots")}
        return replace(self, pages=pages, **tokens)


def make_step(
    lengths: list[tuple[int, int]], *, heads: int, kv_heads: int, head_dim: int, page_tokens: int, dtype: type,
    rotary_dim: int | None = None, seed: int = 0,
) -> Step:  # fmt: skip
    """lengths: (tokens so far, tokens of this step) of each row; two padding tokens follow."""
    rng = np.random.default_rng(seed)
    counts = [-(-(past + new) // page_tokens) for past, new in lengths]
    free = list(rng.permutation(np.arange(1, 1 + sum(counts))))
    table = np.full((len(lengths), max(counts) + 1), -1, np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [free.pop() for _ in range(count)]
    rows = np.repeat(np.arange(-1, len(lengths)), [0, *(new for _, new in lengths)])
    rows = np.append(rows, [-1, -1]).astype(np.int32)
    positions = np.concatenate([*(np.arange(past, past + new) for past, new in lengths), [0, 0]]).astype(np.int32)
    slots = np.where(rows < 0, 0, table[rows, positions // page_tokens] * page_tokens + positions % page_tokens)
    pages = np.full((1 + sum(counts), 2, kv_heads, page_tokens, head_dim), np.nan, np.float32)
    for row, (past, _) in enumerate(lengths):
        for position in range(past):
            written = rng.standard_normal((2, kv_heads, head_dim))
            pages[table[row, position // page_tokens], :, :, position % page_tokens] = written
    tokens, half = len(rows), (head_dim if rotary_dim is None else rotary_dim) // 2
    angles = rng.uniform(0, 6, (tokens, half))
    return Step(
        heads,
        rng.standard_normal((tokens, (heads + 2 * kv_heads) * head_dim)).astype(np.float32),
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
        pages.astype(dtype),
        table,
        rows,
        positions,
        slots.astype(np.int32),
    )


def rotated(x: np.ndarray, step: Step) -> np.ndarray:
    """x: (T, heads, H), in its own precision."""
    half = step.cos.shape[1]
    cos, sin = step.cos[:, None].astype(x.dtype), step.sin[:, None].astype(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def written(step: Step) -> np.ndarray:
    """The pages with this step's keys and values."""
    _, _, kv_heads, page_tokens, head_dim = step.pages.shape
    qkv = step.qkv.astype(np.float64).reshape(len(step.rows), -1, head_dim)
    _, k, v = np.split(qkv, [step.heads, step.heads + kv_heads], axis=1)
    kv = np.stack([rotated(k, step), v], axis=1).astype(np.float32)
    pages = step.pages.copy()
    real = step.rows >= 0
    pages[step.slots[real] // page_tokens, :, :, step.slots[real] % page_tokens] = kv[real]
    return pages


def rounds(pages: np.ndarray) -> bool:
    """Whether the kernel in use rounds queries and the weights of values to bfloat16, to multiply them as such."""
    return LIB.isa == "avx512_bf16" and pages.dtype == ml_dtypes.bfloat16


def queries(step: Step, pages: np.ndarray) -> np.ndarray:
    """Rotated and scaled (T, heads, H) float64, of the values that the kernel multiplies."""
    scale, head_dim = pages.shape[4] ** -0.5, pages.shape[4]
    q = step.qkv.reshape(len(step.rows), -1, head_dim)[:, : step.heads]
    if rounds(pages):  # in float32 and in the kernel's order, so that each falls to the same side
        return (rotated(q, step) * np.float32(scale)).astype(ml_dtypes.bfloat16).astype(np.float64)
    return rotated(q.astype(np.float64), step) * scale


def dense(step: Step, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64 over keys and values that have been written, and how far off the kernel's may be.

    Weights w that are rounded to 8 bits, and summed up as such, are off by a factor of 1 + e with |e| <= 2 ** -8. That
    moves their mean of values v, which is m, by at most the sum of |e| w |v - m|. All else is float32.
    """
    _, _, kv_heads, page_tokens, head_dim = pages.shape
    tokens, group = len(step.rows), step.heads // kv_heads
    q = queries(step, pages)
    out, spread = np.zeros((2, tokens, step.heads, head_dim))
    for t in np.flatnonzero(step.rows >= 0):
        end = step.positions[t] + 1
        seen = np.arange(max(0, end - step.window) if step.window else 0, end)
        kv = pages[step.table[step.rows[t], seen // page_tokens], :, :, seen % page_tokens].astype(np.float64)
        keys, values = np.repeat(kv[:, 0], group, axis=1), np.repeat(kv[:, 1], group, axis=1)
        scores = np.einsum("nh,snh->ns", q[t], keys)
        if step.softcap:
            scores = step.softcap * np.tanh(scores / step.softcap)
        sinks = np.full((step.heads, 1), -np.inf) if step.sinks is None else step.sinks[:, None].astype(np.float64)
        weights = np.exp(scores - np.maximum(scores.max(axis=1, keepdims=True), sinks))
        total = weights.sum(axis=1, keepdims=True) + np.exp(
            sinks - np.maximum(scores.max(axis=1), sinks[:, 0])[:, None]
        )
        out[t] = np.einsum("ns,snh->nh", weights / total, values)
        spread[t] = np.einsum("ns,snh->nh", weights / total, np.abs(values - out[t]))
    return out.reshape(tokens, -1), 5e-6 + (1.01 * 2**-8 if rounds(pages) else 0) * spread.reshape(tokens, -1)


def assert_dense(out: np.ndarray, step: Step, pages: np.ndarray) -> None:
    want, tolerance = dense(step, pages)
    assert (np.abs(out - want) <= tolerance).all(), np.nanmax(np.abs(out - want) / tolerance)


def check(step: Step) -> None:
    out, pages = step.run()
    # A key on the edge between two bfloat16 may fall to the other side: one unit in the last of 8 bits.
    tolerance = 2**-7 if pages.dtype == ml_dtypes.bfloat16 else 1e-6
    np.testing.assert_allclose(pages.astype(np.float32), written(step).astype(np.float32), rtol=tolerance, atol=1e-6)
    assert_dense(out, step, pages)


MIXES = {
    "decode": [(70, 1), (0, 1), (200, 1)],
    "prompt": [(0, 90)],
    "mixed": [(5, 40), (130, 1), (0, 3), (63, 2), (64, 33)],
}
SHAPES = {
    "gqa": {"heads": 4, "kv_heads": 2, "head_dim": 64, "page_tokens": 16},
    "large pages": {"heads": 2, "kv_heads": 2, "head_dim": 128, "page_tokens": 128},
    "odd": {"heads": 3, "kv_heads": 1, "head_dim": 22, "page_tokens": 7},
    "many queries": {"heads": 40, "kv_heads": 1, "head_dim": 16, "page_tokens": 32},
    "part rotated": {"heads": 2, "kv_heads": 1, "head_dim": 80, "page_tokens": 100, "rotary_dim": 20},
    "not rotated": {"heads": 2, "kv_heads": 1, "head_dim": 32, "page_tokens": 8, "rotary_dim": 0},
}
DTYPES = [np.float32, ml_dtypes.bfloat16]


@pytest.mark.quick(isa=NEWEST)
@pytest.mark.quick(shape=["gqa"], mix=["mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mix", MIXES)
def test_attention_is_that_of_float64(isa: str, mix: str, shape: str, dtype: type) -> None:
    check(make_step(MIXES[mix], dtype=dtype, **SHAPES[shape]))


VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"window": 50},
    "narrow window": {"window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": 1.5},
    "all": {"window": 70, "softcap": 30.0, "sinks": -2.0},
}


def varied(step: Step, window: int = 0, softcap: float = 0.0, sinks: float | None = None) -> Step:
    """sinks: their mean."""
    drawn = None if sinks is None else np.random.default_rng(1).normal(sinks, 1, step.heads).astype(np.float32)
    return replace(step, window=window, softcap=softcap, sinks=drawn)


@pytest.mark.quick(isa=NEWEST, shape=["gqa", "odd"])
@pytest.mark.quick(shape=["gqa"], variant=["all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["gqa", "odd", "many queries"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_attention_are_those_of_float64(isa: str, variant: str, shape: str, dtype: type) -> None:
    check(varied(make_step(MIXES["mixed"], dtype=dtype, **SHAPES[shape]), **VARIANTS[variant]))


LONG = [(1400, 1), (500, 30), (0, 3), (1023, 1), (700, 1)]


@pytest.mark.quick(isa=NEWEST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [{}, VARIANTS["all"], {"window": 600}])
def test_long_rows_are_split_over_threads_without_a_change(isa: str, variant, dtype: type) -> None:
    step = varied(make_step(LONG, dtype=dtype, **SHAPES["large pages"]), **variant)
    LIB.set_num_threads(1)
    whole, pages = step.run()
    assert_dense(whole, step, pages)
    for threads in (2, 3, 8):
        LIB.set_num_threads(threads)
        out, _ = step.run()
        np.testing.assert_array_equal(out.view(np.int32), whole.view(np.int32))
        alone, _ = step.part(0, 1, step.pages).run()
        np.testing.assert_array_equal(alone.view(np.int32), whole[:1].view(np.int32))


@pytest.mark.quick(isa=NEWEST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_8192_tokens_are_those_of_float64(isa: str, dtype: type) -> None:
    check(varied(make_step([(8189, 3)], dtype=dtype, **SHAPES["large pages"]), softcap=30.0, sinks=1.5))


def test_pages_in_front_of_the_window_are_not_looked_at(isa: str) -> None:
    step = varied(make_step([(100, 9)], dtype=np.float32, **SHAPES["gqa"]), window=20)
    want, _ = step.run()
    first_seen = (100 - 19) // 16
    step.pages[step.table[0, :first_seen]] = np.nan
    step.table[0, :first_seen] = -1
    out, _ = step.run()
    np.testing.assert_array_equal(out, want)


@settings(max_examples=settings().max_examples // 4, derandomize=True)
@given(
    isa=st.sampled_from(SUPPORTED),
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=5),
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    half_dim=st.integers(1, 40),
    page_tokens=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from([{}, *VARIANTS.values()]),
)
def test_attention_of_any_shape(isa: str, lengths, group, kv_heads, half_dim, page_tokens, dtype, variant) -> None:
    LIB.select(isa)
    shape = {"heads": group * kv_heads, "kv_heads": kv_heads, "head_dim": 2 * half_dim, "page_tokens": page_tokens}
    try:
        check(varied(make_step(lengths, dtype=dtype, **shape), **variant))
    finally:
        LIB.select("")


@pytest.mark.quick(isa=NEWEST, variant=["none"])
@pytest.mark.quick(shape=["gqa"], variant=["all"])
@pytest.mark.parametrize("variant", ["none", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_has_the_same_bits_in_every_step(isa: str, shape: str, dtype: type, variant: str) -> None:
    step = varied(make_step(MIXES["mixed"], dtype=dtype, **SHAPES[shape]), **VARIANTS.get(variant, {}))
    whole, pages = step.run()
    for threads, chunk in ((1, 1), (2, 7), (4, 30), (3, 1000)):
        LIB.set_num_threads(threads)
        so_far, parts = step.pages, []
        for first in range(0, len(step.rows), chunk):
            part, so_far = step.part(first, first + chunk, so_far).run()
            parts.append(part)
        np.testing.assert_array_equal(np.concatenate(parts).view(np.int32), whole.view(np.int32))
        assert so_far.tobytes() == pages.tobytes()


def test_padding_writes_nothing_and_gives_zeros(isa: str) -> None:
    step = make_step([(3, 2)], dtype=np.float32, **SHAPES["gqa"])
    out, pages = step.run()
    assert np.isnan(pages[0]).all()
    assert not out[step.rows < 0].any()
    nobody = replace(step, rows=np.full_like(step.rows, -1))
    out, pages = nobody.run()
    assert not out.any() and pages.tobytes() == step.pages.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_finite(isa: str, dtype: type) -> None:
    step = make_step([(0, 3)], dtype=dtype, **SHAPES["gqa"])
    step.qkv[0], step.qkv[1], step.qkv[2] = np.nan, np.inf, 3.4e38
    _, pages = step.run()
    assert np.isfinite(pages[step.table[0, 0], :, :, :3].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("rows", 1, 9, "row of token 1"),
        ("positions", 0, 10_000, "position of token 0"),
        ("positions", 0, -1, "position of token 0"),
        ("slots", 2, 10_000, "slot of token 2"),
        ("slots", 2, -1, "slot of token 2"),
        ("table", (0, 0), 99, "a page of token"),
        ("table", (0, 0), -1, "a page of token"),
    ],
)
def test_an_index_out_of_range_is_refused(field: str, index, value: int, message: str) -> None:
    step = make_step([(20, 5)], dtype=np.float32, **SHAPES["gqa"])
    getattr(step, field)[index] = value
    with pytest.raises(ValueError, match=message):
        step.run()


def test_xla_calls_the_attention_in_place() -> None:
    name = "tested_max_attention_v3"
    jax.ffi.register_ffi_target(name, LIB.handlers()["max_attention_v3"], platform="cpu")
    step = varied(make_step(MIXES["mixed"], dtype=ml_dtypes.bfloat16, **SHAPES["gqa"]), **VARIANTS["all"])
    want, want_pages = step.run()
    results = (jax.ShapeDtypeStruct(want.shape, want.dtype), jax.ShapeDtypeStruct(step.pages.shape, step.pages.dtype))
    call = jax.ffi.ffi_call(name, results, input_output_aliases={1: 1})
    pages = jax.numpy.array(laid_out(step.pages))
    place = pages.unsafe_buffer_pointer()
    tokens = (step.rows, step.positions, step.slots)
    scale = np.float32(SHAPES["gqa"]["head_dim"] ** -0.5)
    call = partial(call, scale=scale, softcap=np.float32(step.softcap), window=np.int64(step.window))
    out, after = jax.jit(call, donate_argnums=1)(step.qkv, pages, step.cos, step.sin, step.table, *tokens, step.sinks)
    np.testing.assert_array_equal(out, want)
    assert read_back(np.asarray(after)).tobytes() == want_pages.tobytes()
    assert after.unsafe_buffer_pointer() == place


def test_heads_are_taken_up_to_the_limit_that_graphs_know() -> None:
    sizes: dict[str, Any] = {"heads": 2, "kv_heads": 1, "page_tokens": 4, "dtype": np.float32}
    out, _ = make_step([(5, 1)], head_dim=MAX_HEAD_DIM, **sizes).run()
    assert np.isfinite(out).all()
    assert why_no_attention(MAX_HEAD_DIM) is None
    with pytest.raises(ValueError, match=f"heads have 1 to {MAX_HEAD_DIM} dimensions"):
        make_step([(5, 1)], head_dim=MAX_HEAD_DIM + 1, **sizes).run()
    assert why_no_attention(MAX_HEAD_DIM + 1) is not None
