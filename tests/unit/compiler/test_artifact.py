"""A module of graphs through every stage into an artifact, and back into models that compute what JAX does."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from max import CacheError, CompileError, ConfigError, MaxError, RequestError
from max.cache import mef
from max.compiler import Graph, Module, Target, TensorType, probe, xla_lowering, xla_targets
from max.compiler.artifact import Options, compile_module
from max.compiler.counters import COUNTERS
from max.runtime.model import Buffer, InputError
from max.runtime.session import CompiledModels, InferenceSession

D = 6
MATRIX, ROW, SCALAR = TensorType("float32", (D, D)), TensorType("float32", (D,)), TensorType("float32", ())


@jax.jit
def layer(weight: jax.Array, total: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = jnp.tanh(x @ weight)
    return y, total + y


def make_module() -> Module:
    """`advance` is nothing but two calls of `layer`; `read` is one executable and shares weights and state with it."""
    module = Module("pair")
    weights = {"w0": MATRIX, "w1": MATRIX}

    def advance(weights, state, x):
        y, first = layer(weights["w0"], state["t0"], x)
        y, second = layer(weights["w1"], state["t1"], y)
        return y, {"t0": first, "t1": second}

    def read(weights, state, scale, mask):
        total = jnp.where(mask, state["t0"] + state["t1"], 0) * scale
        return (total, weights["w0"].sum()), {"t0": state["t0"]}

    totals = {"t0": ROW, "t1": ROW}
    Graph("advance", advance, {"x": ROW}, weights=weights, state=totals, outputs=("y",), module=module)
    inputs = {"scale": SCALAR, "mask": TensorType("bool", (D,))}

    def read_all(weights, state, scale, mask):
        outputs, kept = read(weights, state, scale, mask)
        return outputs, {**kept, "t1": state["t1"]}

    Graph("read", read_all, inputs, weights={"w0": MATRIX}, state=totals, outputs=("total",), module=module)
    return module


def compiled(module: Module, **options) -> bytes:
    buffer = io.BytesIO()
    compile_module(module, Target.parse("cpu"), mef.MefWriter(buffer), Options(**options))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data() -> bytes:
    return compiled(make_module(), facts={"vocab_size": 7}, weights={"weights": [], "ignored": []})


@pytest.fixture(scope="module")
def artifact(data) -> mef.Mef:
    return mef.Mef.from_bytes(data)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(D, D)).astype(np.float32) for name in ("w0", "w1", "unused")}


@pytest.fixture
def models(artifact, weights):
    return InferenceSession().init_all(CompiledModels(artifact), weights)


def x_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=D).astype(np.float32)


ALL, ONE = np.ones(D, bool), np.ones((), np.float32)


# --- the file ------------------------------------------------------------------------------------------------------


def test_every_section_is_there(artifact):
    found = {(section.kind, section.name) for section in artifact.sections()}
    single = (mef.MANIFEST, mef.COMPAT, mef.SIGNATURES, mef.WEIGHTS, mef.CUSTOM_CALLS, mef.MEMORY, mef.COST)
    assert found == {
        *((kind, "") for kind in (*single, mef.PROBE, mef.PROVENANCE)),
        (mef.MODULE, "pair"),
        *((mef.JAXPR, name) for name in ("advance", "read")),
        *((mef.NATIVE, name) for name in ("layer", "read")),
    }
    for section in artifact.sections():
        assert (section.target == "cpu:native") == (section.kind == mef.NATIVE)
        assert artifact.read(section)


def test_manifest(artifact):
    manifest = artifact.json(mef.MANIFEST)
    assert (manifest["name"], manifest["target"], manifest["facts"]) == ("pair", "cpu:native", {"vocab_size": 7})
    advance, read = manifest["graphs"]["advance"], manifest["graphs"]["read"]
    assert [(row["name"], row["role"]) for row in advance["arguments"]] == [
        ("w0", "weight"), ("w1", "weight"), ("t0", "state"), ("t1", "state"), ("x", "input"),
    ]  # fmt: skip
    assert advance["calls"] == [["layer", [0, 2, 4], [5, 6]], ["layer", [1, 3, 5], [7, 8]]]
    assert advance["returns"] == [7, 6, 8]
    assert advance["outputs"] == [{"name": "y", "dtype": "float32", "shape": [D]}]
    assert [row["name"] for row in read["outputs"]] == ["total", "output1"]
    assert {"name": "mask", "role": "input", "dtype": "bool", "shape": [D]} in read["arguments"]


def test_signatures_say_which_memory_is_taken_over(artifact):
    signatures = artifact.json(mef.SIGNATURES)
    row, matrix = {"dtype": "float32", "shape": [D]}, {"dtype": "float32", "shape": [D, D]}
    assert signatures["layer"] == {"arguments": [matrix, row, row], "results": [row, row], "aliases": [[1, 1]]}
    assert signatures["read"]["aliases"] == [[1, 2], [2, 3]]
    assert artifact.json(mef.MEMORY)["read"]["aliased"] == 2 * D * 4


def test_cost_compat_and_provenance(artifact):
    assert artifact.json(mef.COST)["layer"]["flops"] >= 2 * D * D
    compat = artifact.json(mef.COMPAT)
    assert compat["requires"] == list(Target.parse("cpu").features)
    assert compat["machine"] == xla_targets.machine(Target.parse("cpu"))
    provenance = artifact.json(mef.PROVENANCE)
    assert provenance["toolchain"]["jaxlib"] == compat["jaxlib"]
    assert provenance["seconds"].keys() == {"trace", "merge", "compile"}


def test_stored_stages_can_be_read(artifact):
    section = artifact.find(mef.MODULE, "pair")
    text = str(xla_lowering.from_portable_bytecode(artifact.read(section)))
    assert text.count("func.func public") == 2
    assert text.count("func.func private @layer") == 1
    assert b"lambda" in artifact.read(artifact.find(mef.JAXPR, "read"))


def test_the_probe_agrees_with_the_stored_code(artifact):
    stored = artifact.json(mef.PROBE)
    models = CompiledModels(artifact)
    assert stored["results"].keys() == {"layer", "read"}
    for name, expected in stored["results"].items():
        types = [
            TensorType(row["dtype"], tuple(row["shape"])) for row in artifact.json(mef.SIGNATURES)[name]["arguments"]
        ]
        assert probe.differences(expected, probe.run(models.load_executable(name), name, types)) == []


def test_summary_counts_and_progress(data):
    done, buffer = [], io.BytesIO()
    before = COUNTERS.traced, COUNTERS.compiled
    options = Options(progress=lambda phase, item, count, total: done.append((phase, item, count, total)))
    summary = compile_module(make_module(), Target.parse("cpu"), mef.MefWriter(buffer), options)
    assert (summary.graphs, summary.executables) == (2, 2)
    assert summary.seconds.keys() == {"trace", "merge", "compile", "write"}
    assert summary.artifact_id == mef.Mef.from_bytes(buffer.getvalue()).id
    assert (COUNTERS.traced, COUNTERS.compiled) == (before[0] + 2, before[1] + 2)
    assert done[:2] == [("trace", "advance", 1, 2), ("trace", "read", 2, 2)]
    assert sorted(done[2:]) == [("compile", "layer", 1, 2), ("compile", "read", 2, 2)]


def test_what_is_compiled_is_the_same_in_every_process(artifact, tmp_path):
    """With another hash seed, so that no order of a set can hide in a section."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_artifact
open("other.mef", "wb").write(test_artifact.compiled(test_artifact.make_module(), facts={{"vocab_size": 7}}))
"""
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)
    other = mef.Mef.open(tmp_path / "other.mef")
    for kind, name in (
        (mef.MANIFEST, ""), (mef.SIGNATURES, ""), (mef.COMPAT, ""), (mef.CUSTOM_CALLS, ""), (mef.MEMORY, ""),
        (mef.COST, ""), (mef.PROBE, ""), (mef.MODULE, "pair"), (mef.JAXPR, "advance"), (mef.JAXPR, "read"),
    ):  # fmt: skip
        ours, theirs = artifact.find(kind, name), other.find(kind, name)
        assert ours and theirs, kind
        assert artifact.read(ours) == other.read(theirs), kind


# --- what runs -----------------------------------------------------------------------------------------------------


def test_results_are_those_of_jax_and_state_is_shared(models, weights):
    totals = [np.zeros(D, np.float32), np.zeros(D, np.float32)]
    for step in range(4):
        y = x_of(step)
        for i in range(2):
            y, totals[i] = layer(weights[f"w{i}"], totals[i], y)
        (got,) = models["advance"](x_of(step))
        np.testing.assert_allclose(got.to_numpy(), y, rtol=1e-5, atol=1e-6)
        total, norm = models["read"](np.full((), 2, np.float32), ALL)
        np.testing.assert_allclose(total, 2 * (totals[0] + totals[1]), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm, weights["w0"].sum(), rtol=1e-5)


@pytest.mark.parametrize("use_subgraphs", [True, False])
def test_plans_and_whole_graphs_give_the_same(use_subgraphs, weights, models):
    other = mef.Mef.from_bytes(compiled(make_module(), use_subgraphs=use_subgraphs))
    found = InferenceSession().init_all(CompiledModels(other), weights)
    for step in range(2):
        np.testing.assert_allclose(found["advance"](x_of(step))[0], models["advance"](x_of(step))[0], rtol=1e-5)
    names = {section.name for section in other.sections() if section.kind == mef.NATIVE}
    assert names == ({"layer", "read"} if use_subgraphs else {"advance", "read"})


def test_each_load_has_its_own_state(artifact, weights):
    session = InferenceSession()
    first, second = (session.init_all(CompiledModels(artifact), weights) for _ in range(2))
    first["advance"](x_of(0))
    assert np.asarray(first["read"](ONE, ALL)[0]).any()
    assert not np.asarray(second["read"](ONE, ALL)[0]).any()


def test_outputs_stay_valid_while_the_state_goes_on(models):
    outputs = [models["read"](ONE, ALL)[0]]
    kept = []
    for step in range(3):
        models["advance"](x_of(step))
        outputs.append(models["read"](ONE, ALL)[0])
        kept.append(outputs[-1].to_numpy().copy())
    gc.collect()
    for output, copy in zip(outputs[1:], kept, strict=True):
        np.testing.assert_array_equal(output, copy)
    assert len({array.tobytes() for array in kept}) == 3


def test_outputs_can_be_inputs(models):
    (y,) = models["advance"](x_of(0))
    assert isinstance(y, Buffer)
    assert (y.shape, y.dtype) == ((D,), "float32")
    models["advance"](y)


def test_loading_from_a_path_compiles_nothing(data, tmp_path, weights):
    path = tmp_path / "pair.mef"
    path.write_bytes(data)
    before = COUNTERS.traced, COUNTERS.compiled, COUNTERS.loaded
    models = InferenceSession().load_all(path, weights)
    assert (COUNTERS.traced, COUNTERS.compiled, COUNTERS.loaded) == before, "code is loaded when it is first called"
    models["advance"](x_of(0))
    assert COUNTERS.loaded == before[2] + 1
    models["read"].load()
    assert COUNTERS.loaded == before[2] + 2
    compiled_models = InferenceSession().compile(str(path))
    compiled_models.export_mef(tmp_path / "copy.mef")
    assert (tmp_path / "copy.mef").read_bytes() == data


def test_metadata(artifact, models):
    found = CompiledModels(artifact)
    assert len(found) == 2
    assert [row.name for row in found] == ["advance", "read"]
    assert [(spec.name, spec.dtype, spec.shape) for spec in found[1].input_metadata] == [
        ("scale", "float32", ()),
        ("mask", "bool", (D,)),
    ]
    assert [spec.name for spec in models["read"].output_metadata] == ["total", "output1"]
    assert "advance" in repr(models["advance"])
    assert found.vocab_size == 7


def test_a_graph_of_its_own_loads_by_itself():
    model = InferenceSession().load(Graph("double", lambda x: x * 2, [TensorType("bfloat16", (3,))]))
    x = np.arange(3).astype(ml_dtypes.bfloat16)
    result = model(x)[0].to_numpy()
    assert (result.dtype, result.tolist()) == (ml_dtypes.bfloat16, [0, 2, 4])


def test_any_layout_in_memory_will_do(models):
    wide = np.zeros((D, 2), np.float32)
    wide[:, 0] = x_of(3)
    np.testing.assert_array_equal(models["advance"](wide[:, 0])[0], models["advance"](x_of(3))[0])


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "advance takes 1 inputs, not 0"),
        ((np.zeros(D, np.float32),) * 2, "advance takes 1 inputs, not 2"),
        ((np.zeros(D, np.int32),), r"input x at position 0 is int32\[6\]"),
        ((np.zeros(D, np.float64),), r"input x at position 0 is float64\[6\]"),
        ((np.zeros(D, ">f4"),), r"input x at position 0 is >f4\[6\]"),
        ((np.zeros((D, 1), np.float32),), r"input x at position 0 is float32\[6,1\]"),
        ((np.zeros(D + 1, np.float32),), r"input x at position 0 is float32\[7\]"),
        (([0.0] * D,), "input x at position 0 is a list"),
        ((None,), "input x at position 0 is a NoneType"),
    ],
)
def test_inputs_are_checked(models, inputs, message):
    """PJRT would take anything of the same number of bytes."""
    with pytest.raises(InputError, match=message) as caught:
        models["advance"](*inputs)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RequestError)
    assert caught.value.hint


def test_outputs_of_other_types_are_refused_too(models):
    norm = models["read"](ONE, ALL)[1]
    with pytest.raises(InputError, match=r"float32\[\]"):
        models["advance"](norm)


def test_a_refused_call_leaves_the_state_alone(models):
    models["advance"](x_of(0))
    before = np.asarray(models["read"](ONE, ALL)[0])
    with pytest.raises(InputError):
        models["advance"](np.zeros(D, np.int32))
    np.testing.assert_array_equal(models["read"](ONE, ALL)[0], before)


def test_state_is_not_lost_silently(artifact, weights):
    """A load that fails leaves it; a call that fails has taken it along, and zeros in its place would be wrong."""
    found = CompiledModels(artifact)
    models = InferenceSession().init_all(found, weights)
    models["advance"](x_of(0))
    executables = models["read"]._executables

    def refuse(_: Any) -> Any:
        raise CacheError("damaged", "")

    executables._load = refuse
    with pytest.raises(CacheError):
        models["read"](ONE, ALL)
    executables._load = found.load_executable
    assert np.asarray(models["read"](ONE, ALL)[0]).any()
    models["read"]._calls = [(refuse, choose) for _, choose in models["read"]._loaded_calls()]  # type: ignore[misc]
    with pytest.raises(CacheError):
        models["read"](ONE, ALL)
    with pytest.raises(MaxError, match="the state t0 was lost"):
        models["advance"](x_of(1))


def test_weights_are_checked(artifact, weights):
    session, found = InferenceSession(), CompiledModels(artifact)
    with pytest.raises(InputError, match="no weight was given for w0, w1"):
        session.init_all(found)
    with pytest.raises(InputError, match=r"w1 at position 1 is float64\[6,6\]"):
        session.init_all(found, {**weights, "w1": weights["w1"].astype(np.float64)})
    with pytest.raises(InputError, match=r"w0 at position 0 is float32\[3,12\]"):
        session.init_all(found, {**weights, "w0": weights["w0"].reshape(3, 12)})


def test_damage_in_code_is_found_before_it_is_loaded(data, weights):
    section = mef.Mef.from_bytes(data).find(mef.NATIVE, "layer", "cpu:native")
    assert section is not None
    broken = bytearray(data)
    broken[section.offset + section.stored_bytes // 2] ^= 1
    models = InferenceSession().init_all(CompiledModels(mef.Mef.from_bytes(bytes(broken))), weights)
    with pytest.raises(CacheError, match="damaged section native/layer"):
        models["advance"](x_of(0))


def test_code_for_other_hosts_is_refused(artifact, monkeypatch):
    found = CompiledModels(artifact)
    stored = artifact.json(mef.COMPAT)
    cuda = {"target": "cuda:sm_90", "platform": "cuda"}
    for change, message in (({"requires": ["amx_fp64"]}, "needs amx_fp64"), (cuda, "cuda:sm_90 .* on cpu:native")):
        monkeypatch.setattr(artifact, "json", lambda kind, change=change: {**stored, **change})
        with pytest.raises(CacheError, match=message):
            InferenceSession().init_all(found)


def test_load_wants_one_graph(data, tmp_path, weights):
    with pytest.raises(RequestError, match="there are 2 graphs: advance, read"):
        InferenceSession().load(make_module().graphs["read"], weights)


def test_paths_without_artifacts(tmp_path):
    with pytest.raises(ConfigError, match="there is no artifact"):
        InferenceSession().load_all(tmp_path / "absent.mef")
    (tmp_path / "text.mef").write_text("not a MEF")
    with pytest.raises(CacheError, match="truncated"):
        InferenceSession().load_all(tmp_path / "text.mef")


def test_types_without_a_name_are_refused():
    with pytest.raises(CompileError, match="complex<f32>"):
        compiled(Graph("g", lambda x: jax.lax.complex(x, x), [ROW]).module)
