"""The graph that makes the pages: zeros, also in memory that was used before."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from max.compiler.native import library
from max.models import kernels

KERNELS = library()
if KERNELS is None:
    pytest.skip("the package was installed without a C++ compiler", allow_module_level=True)
assert KERNELS is not None


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    assert KERNELS is not None
    jax.ffi.register_ffi_target("max_lazy_zeros_v1", KERNELS.handlers()["max_lazy_zeros_v1"], platform="cpu")


@pytest.mark.parametrize("shape", [(3,), (1000,), (5, 1025), (1 << 20,)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_they_are_zero_in_used_memory_too(shape: tuple[int, ...], dtype: type) -> None:
    make = jax.jit(lambda: kernels.lazy_zeros([jax.ShapeDtypeStruct(shape, dtype)] * 2))
    spoil = jax.jit(lambda x: x + 7, donate_argnums=0)
    for _ in range(4):
        first, second = make()
        assert not np.asarray(first).any() and not np.asarray(second).any()
        assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()
        spoiled = spoil(first)
        assert (np.asarray(spoiled) == 7).all()
        del first, second, spoiled
