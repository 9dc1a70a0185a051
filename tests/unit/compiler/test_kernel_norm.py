"""The norm kernel, with and without a residual, against float64 and through XLA, for every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from max.compiler.native import ISAS, Library, library
from max.models import layers

LIB = library()
pytestmark = pytest.mark.skipif(LIB is None, reason="the kernels were not built: no C++ compiler")
SHAPES = [(0, 8), (1, 1), (1, 7), (3, 64), (17, 100), (33, 1024), (257, 65)]


@pytest.fixture(params=[isa for isa in ISAS if LIB is not None and LIB.supports(isa)])
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    assert LIB is not None
    LIB.select(request.param)
    yield LIB
    LIB.select("")
    LIB.set_num_threads(0)


def given(rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows * 1000 + width)
    x, delta = (rng.normal(size=(rows, width)).astype(np.float32) * 3 for _ in range(2))
    return x, delta, rng.normal(size=width).astype(np.float32)


def normed(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    x64 = x.astype(np.float64)
    return x64 / np.sqrt(np.mean(x64**2, axis=1, keepdims=True) + epsilon) * weight


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_norm_is_that_of_float64(lib: Library, rows: int, width: int) -> None:
    x, delta, weight = given(rows, width)
    y, total = np.full_like(x, np.nan), np.full_like(x, np.nan)
    lib.rms_norm(x, weight, y, 1e-5)
    np.testing.assert_allclose(y, normed(x, weight, 1e-5), rtol=1e-6, atol=1e-6)
    y[:] = np.nan
    lib.rms_norm(x, weight, y, 1e-5, delta=delta, total=total)
    np.testing.assert_array_equal(total, x + delta)
    np.testing.assert_allclose(y, normed(x + delta, weight, 1e-5), rtol=1e-6, atol=1e-6)


def test_a_sum_may_take_the_place_of_its_first_term(lib: Library) -> None:
    x, delta, weight = given(5, 99)
    y, expected = np.empty_like(x), np.empty_like(x)
    lib.rms_norm(x, weight, expected, 1e-5, delta=delta, total=np.empty_like(x))
    wanted = x + delta
    lib.rms_norm(x, weight, y, 1e-5, delta=delta, total=x)
    np.testing.assert_array_equal(x, wanted)
    np.testing.assert_array_equal(y, expected)


def test_a_row_does_not_depend_on_the_others_nor_on_threads(lib: Library) -> None:
    x, _, weight = given(70, 333)
    whole, alone = np.empty_like(x), np.empty_like(x)
    lib.set_num_threads(2)
    lib.rms_norm(x, weight, whole, 1e-6)
    lib.set_num_threads(1)
    for row in range(len(x)):
        lib.rms_norm(x[row : row + 1], weight, alone[row : row + 1], 1e-6)
    np.testing.assert_array_equal(whole, alone)


def test_arguments_that_do_not_fit_are_refused(lib: Library) -> None:
    x, delta, weight = given(3, 8)
    y = np.empty_like(x)
    with pytest.raises(ValueError, match="do not fit"):
        lib.rms_norm(x, weight[:4].copy(), y, 1e-5)
    with pytest.raises(ValueError, match="sum"):
        lib.rms_norm(x, weight, y, 1e-5, delta=delta)
    with pytest.raises(ValueError, match="columns"):
        lib.rms_norm(np.empty((3, 0), np.float32), weight[:0], np.empty((3, 0), np.float32), 1e-5)


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (40, 100)])
def test_graphs_call_it_and_agree_with_plain_xla(rows: int, width: int) -> None:
    x, delta, weight = map(jnp.asarray, given(rows, width))
    assert LIB is not None
    for name in ("max_rms_norm_v1", "max_add_rms_norm_v1"):
        jax.ffi.register_ffi_target(name, LIB.handlers()[name], platform="cpu")

    def both(use_kernels: bool) -> list[jax.Array]:
        def graph(x: jax.Array, delta: jax.Array) -> tuple[jax.Array, ...]:
            plain = layers.rms_norm(x, weight, 1e-5, use_kernels=use_kernels)
            # x is read again afterwards: the sum in its place must not be seen.
            return plain, *layers.add_rms_norm(x, delta, weight, 1e-5, use_kernels=use_kernels), x

        return list(jax.jit(graph)(x, delta))

    for kernel, plain in zip(both(True), both(False), strict=True):
        np.testing.assert_allclose(kernel, plain, rtol=2e-6, atol=2e-6)
