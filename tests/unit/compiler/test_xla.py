"""The adapter to XLA: every private name that it uses, shared memory, donation, and what damaged bytes do."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax._src.interpreters.mlir as jax_mlir
import jax._src.xla_bridge as xla_bridge
import ml_dtypes
import numpy as np
import pytest
from jaxlib import xla_client
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from max import CacheError, CompileError
from max.compiler import Graph, TensorType, merge, segments, xla, xla_compiler, xla_lowering
from max.compiler.counters import COUNTERS

F4 = TensorType("float32", (4,))
ADAPTER = sorted(Path(xla.__file__).parent.glob("xla*.py"))
extension: Any = getattr(xla_client, "_xla")  # noqa: B009


def aligned(count: int, dtype: str = "float32") -> np.ndarray:
    """0, 1, 2, ... at a 64-byte boundary."""
    memory = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + count * np.dtype(dtype).itemsize].view(dtype)
    array[:] = np.arange(count)
    return array


def compiled(graph: Graph) -> bytes:
    """The executable of a graph called main."""
    module = merge.merge("m", {"main": xla_lowering.lower(graph, "cpu").stablehlo})
    donated = tuple((i, i) for i, argument in enumerate(graph.arguments) if argument.role == "state")
    source = xla_lowering.bytecode(segments.extract(module, "main", donated))
    return xla_compiler.compile_stablehlo(source, "main").executable


def count_up(weights: Any, state: Any) -> Any:
    return (), {"s": state["s"] + 1}


# --- private names -------------------------------------------------------------------------------------------------

EXTENSION = {
    "array_result_handler", "batched_block_until_ready", "batched_device_put", "buffer_to_dlpack_managed_tensor",
    "get_topology_for_devices", "hlo_module_cost_analysis", "HostBufferSemantics", "JaxRuntimeError", "mlir",
    "SingleDeviceSharding", "DeviceTopology", "ArrayImpl", "GSPMDSharding",
}  # fmt: skip


def test_every_name_of_the_extension_that_is_used_is_listed_here_and_exists():
    used = {
        node.attr
        for adapter in ADAPTER
        for node in ast.walk(ast.parse(adapter.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "_xla"
    }
    assert used == EXTENSION
    for name in EXTENSION:
        assert hasattr(extension, name), name


def test_names_of_xla_client_and_of_its_objects():
    assert callable(xla_client.make_cpu_client)
    assert callable(xla_client.DeviceList)
    options = xla_client.CompileOptions()
    assert hasattr(options, "env_option_overrides")
    client = xla.host().client
    assert {"local_devices", "compile_and_load", "deserialize_executable"} <= set(dir(client))
    assert hasattr(extension.HostBufferSemantics, "IMMUTABLE_ONLY_DURING_CALL")
    buffer = xla.put(np.zeros(4, np.float32))
    assert {"aval", "unsafe_buffer_pointer"} <= set(dir(buffer))
    assert callable(xla_client.HloSharding.manual)
    assert {"num_replicas", "device_assignment"} <= set(dir(options))
    assert callable(xla_client.DeviceAssignment.create) and hasattr(buffer, "_arrays")
    array, _ = buffer._single_device_array_to_np_array_did_copy()
    assert array.tolist() == [0, 0, 0, 0]


def test_names_of_plugins_and_topologies():
    for name in (
        "load_pjrt_plugin_dynamically", "initialize_pjrt_plugin", "pjrt_plugin_initialized", "make_c_api_client",
        "make_c_api_device_topology", "generate_pjrt_gpu_plugin_options",
    ):  # fmt: skip
        assert callable(getattr(xla_client, name))
    assert callable(xla_client.make_tfrt_tpu_c_api_device_topology)
    topology = extension.get_topology_for_devices(xla.host_devices())
    assert {"serialize", "deserialize", "_make_compile_only_devices"} <= set(dir(topology))
    assert "compile" in dir(topology._make_compile_only_devices()[0].client)
    assert isinstance(xla_bridge._plugins_registered, bool)


def test_names_of_loaded_executables():
    data = compiled(Graph("main", lambda x: x + 1, [F4]))
    loaded = xla.host().client.deserialize_executable(data, xla.host().devices, None)
    names = {"execute_sharded", "hlo_modules", "cost_analysis", "get_compiled_memory_stats", "serialize"}
    assert names <= set(dir(loaded))
    stats = loaded.get_compiled_memory_stats()
    for part in ("argument", "output", "alias", "temp", "generated_code"):
        assert getattr(stats, f"{part}_size_in_bytes") >= 0


def test_names_of_jax_and_of_mlir():
    assert callable(jax_mlir.make_ir_context)
    assert callable(jax_mlir.module_to_bytecode)
    assert stablehlo.StablehloCompatibilityRequirement.WEEK_12 is not None
    assert callable(stablehlo.get_version_from_compatibility_requirement)
    assert callable(stablehlo.deserialize_portable_artifact)
    assert callable(extension.mlir.serialize_portable_artifact)
    traced = jax.jit(lambda x: x + 1).trace(jax.ShapeDtypeStruct((4,), "float32"))
    assert traced.out_info.shape == (4,)
    assert "lowering_platforms" in inspect.signature(traced.lower).parameters


def test_no_other_file_touches_private_names():
    """jax._src and jaxlib's extension are for the adapter alone."""
    root = Path(xla.__file__).parents[1]
    for folder in ("cache", "compiler", "models", "runtime", "serve", "bench", "cli"):
        for path in (root / folder).rglob("*.py"):
            if path not in ADAPTER:
                text = path.read_text()
                assert "jax._src" not in text, path
                assert "xla_client" not in text, path
                assert "._xla" not in text, path


# --- memory --------------------------------------------------------------------------------------------------------


def test_aligned_arrays_are_shared_both_ways():
    array = aligned(64)
    buffer = xla.put(array)
    assert xla.address(buffer) == array.ctypes.data
    back = xla.fetch(buffer)
    assert back.ctypes.data == array.ctypes.data
    assert not back.flags.writeable
    np.testing.assert_array_equal(back, array)


def test_other_arrays_are_copied():
    array = aligned(65)[1:]
    buffer = xla.put(array)
    assert xla.address(buffer) != array.ctypes.data
    np.testing.assert_array_equal(xla.fetch(buffer), array)


def test_a_buffer_keeps_its_array_and_a_fetched_array_its_buffer():
    buffer = xla.put(aligned(1 << 16))
    back = xla.fetch(buffer)
    del buffer
    filler = [np.full(1 << 16, -1.0, np.float32) for _ in range(8)]
    np.testing.assert_array_equal(back, np.arange(1 << 16))
    del filler


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "int32", "uint8", "uint32", "bool", "float64"]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_every_dtype_and_shape_comes_back(dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(getattr(ml_dtypes, dtype, dtype))
    back = xla.fetch(xla.put(array))
    assert (back.dtype, back.shape) == (array.dtype, shape)
    assert back.tobytes() == array.tobytes()
    assert xla.numpy_dtype(dtype) == array.dtype


def test_owned_zeros():
    buffer = xla.put_owned((3, 5), "bfloat16")
    back = xla.fetch(buffer)
    assert (back.shape, back.dtype, np.count_nonzero(back)) == ((3, 5), ml_dtypes.bfloat16, 0)


def test_donated_memory_becomes_the_result():
    executable = xla.load_executable(compiled(Graph("main", count_up, state={"s": F4})), [F4])
    buffer = xla.put_owned((4,), "float32")
    xla.wait([buffer])
    where = xla.address(buffer)
    for _ in range(3):
        (buffer,) = executable([buffer])
        assert xla.address(buffer) == where
    assert xla.fetch(buffer).tolist() == [3, 3, 3, 3]


def test_a_fetched_array_survives_the_donation_of_its_buffer():
    data = compiled(Graph("main", count_up, state={"s": F4}))
    buffer = xla.put_owned((4,), "float32")
    held = xla.fetch(buffer)
    xla.wait(xla.load_executable(data, [F4])([buffer]))
    assert held.tolist() == [0, 0, 0, 0]


# --- executables ---------------------------------------------------------------------------------------------------


def test_compile_reports_cost_memory_and_code():
    graph = Graph("main", lambda x: x @ x.T, [TensorType("float32", (8, 16))])
    module = merge.merge("m", {"main": xla_lowering.lower(graph, "cpu").stablehlo})
    before = COUNTERS.compiled
    found = xla_compiler.compile_stablehlo(xla_lowering.bytecode(module), "g")
    assert COUNTERS.compiled == before + 1
    assert found.flops >= 8 * 8 * 16 * 2
    assert found.bytes_accessed >= 8 * 16 * 4
    assert (found.memory["arguments"], found.memory["outputs"]) == (8 * 16 * 4, 8 * 8 * 4)
    assert "HloModule" in found.optimized_hlo
    executable = xla.load_executable(found.executable, [TensorType("float32", (8, 8))])
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    np.testing.assert_allclose(xla.fetch(executable([xla.put(x)])[0]), x @ x.T, rtol=1e-5)


@pytest.mark.parametrize("data", [b"", b"\x00", b"garbage" * 1000, bytes(range(256)) * 16])
def test_garbage_is_a_cache_error(data):
    with pytest.raises(CacheError, match="cannot be loaded"):
        xla.load_executable(data, [F4])


def test_a_truncated_executable_is_a_cache_error():
    data = compiled(Graph("main", lambda x: x * 2, [F4]))
    for length in (1, len(data) // 2, len(data) - 1):
        with pytest.raises(CacheError):
            xla.load_executable(data[:length], [F4])


def test_what_xla_refuses_is_a_compile_error():
    with pytest.raises(CompileError, match="XLA cannot compile broken"):
        xla_compiler.compile_stablehlo(b"not a module", "broken")


def test_state_must_keep_its_type():
    """PJRT compares sizes only: int32 in the place of float32 would pass."""
    for new in (lambda s: s.astype("int32"), lambda s: s[:2], lambda s: s.reshape(2, 2)):
        graph = Graph("g", lambda weights, state, new=new: ((), {"s": new(state["s"])}), state={"s": F4})
        with pytest.raises(CompileError, match=r"graph g returns the state s as .*, not as float32"):
            xla_lowering.lower(graph, "cpu")


def test_lowering_counts_and_keeps_unused_arguments():
    before = COUNTERS.traced
    lowered = xla_lowering.lower(Graph("g", lambda x, unused: x + 1, [F4, TensorType("int32", (7,))]), "cpu")
    assert COUNTERS.traced == before + 1
    assert "lambda" in lowered.jaxpr
    with xla_lowering.mlir_context():
        assert "tensor<7xi32>" in str(ir.Module.parse(lowered.stablehlo))


def test_portable_bytecode_reads_back_even_with_operations_of_chlo():
    graph = Graph("g", lambda x: (jax.scipy.special.erf(x), jax.lax.top_k(x, 2)[0]), [F4])
    module = merge.merge("m", {"g": xla_lowering.lower(graph, "cpu").stablehlo})
    before = str(module)
    data = xla_lowering.portable_bytecode(module)
    assert str(module) == before, "serializing leaves the module as it was"
    text = str(xla_lowering.from_portable_bytecode(data))
    assert "func.func public @g(%arg0: tensor<4xf32>)" in text
    assert "chlo.erf" in text


# --- a warm start --------------------------------------------------------------------------------------------------


def test_loading_and_calling_imports_no_jax(tmp_path):
    data = compiled(Graph("main", lambda x: x * 2 + 1, [F4]))
    (tmp_path / "code").write_bytes(data)
    script = """
import sys
import numpy as np
from max.compiler import TensorType, xla, xla_compiler, xla_lowering
executable = xla.load_executable(open("code", "rb").read(), [TensorType("float32", (4,))])
(result,) = executable([xla.put(np.arange(4, dtype=np.float32))])
heavy = {"jax", "flax", "transformers"} & sys.modules.keys()
print(xla.fetch(result).tolist(), sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[1.0, 3.0, 5.0, 7.0] []\n"
    assert done.stderr == ""
