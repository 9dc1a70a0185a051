"""Machines and topologies: what XLA compiles for here, CPU levels, and the protobuf that they are written in."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from max import CompileError, ConfigError
from max.compiler import Graph, Target, TensorType, merge, xla, xla_compiler, xla_lowering, xla_targets
from max.compiler.dump import Dump
from max.compiler.targets import host_features
from max.compiler.targets.toolchain import why_not

F = TensorType("float32", (33, 64))

pytestmark = pytest.mark.skipif(bool(why_not(Target.parse("cpu:x86-64"))), reason="made on x86-64 hosts only")


def bytecode() -> bytes:
    graph = Graph("main", lambda x: jnp.tanh(x @ x.T) + jnp.sum(jnp.exp(x)), [F])
    return xla_lowering.bytecode(merge.merge("m", {"main": xla_lowering.lower(graph, "cpu").stablehlo}))


def compiled(name: str, folder: Path, dump_to: str | None = None) -> bytes:
    return xla_targets.TargetCompiler(Target.parse(name), folder).compile(bytecode(), "main", {}, dump_to).executable


def test_the_machine_is_this_one() -> None:
    machine = xla_targets.machine(Target.parse("cpu"))
    assert machine["triple"].split("-")[0] in ("x86_64", "aarch64", "arm64")
    assert machine["cpu"]
    assert machine["features"] == sorted(machine["features"])
    assert all(feature[0] in "+-" for feature in machine["features"])
    assert "+sse2" in machine["features"] or "+neon" in machine["features"]
    json.dumps(machine)


@pytest.mark.quick(level=["x86-64"])
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v2", "x86-64-v3"])
def test_code_for_a_level_computes_what_native_code_does(level: str, tmp_path: Path) -> None:
    target = Target.parse(f"cpu:{level}")
    if not target.runs_here():
        pytest.skip(f"this host is less than {level}")
    x = np.random.default_rng(0).normal(size=F.shape).astype(np.float32)
    results = []
    for data in (compiled(target.name, tmp_path), xla_compiler.compile_stablehlo(bytecode(), "main").executable):
        executable = xla.load_executable(data, [TensorType("float32", (33, 33))])
        results.append(xla.fetch(executable([xla.put(x)])[0]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs a disassembler")
@pytest.mark.quick(level=["x86-64-v3"])
@pytest.mark.parametrize(
    ("level", "has", "lacks"),
    [
        ("x86-64", r"%xmm", r"%[yz]mm|\bv[a-z]"),
        ("x86-64-v3", r"%ymm", r"%zmm|%k[0-7]"),
        ("x86-64-v4", r"%[xyz]mm", "$^"),
    ],
)
def test_code_for_a_level_holds_its_instructions_only(level: str, has: str, lacks: str, tmp_path: Path) -> None:
    dump = Dump(tmp_path / "dump")
    with dump.code("main") as folder:
        compiled(f"cpu:{level}", tmp_path, folder)
    assembly = (tmp_path / "dump" / "main.6.asm").read_text()
    code = "\n".join(line.split("\t", 1)[1] for line in assembly.splitlines() if "\t" in line)
    assert re.search(has, code)
    assert not re.search(lacks, code)


def test_what_xla_refuses_is_a_compile_error(tmp_path: Path) -> None:
    compiler = xla_targets.TargetCompiler(Target.parse("cpu:x86-64-v3"), tmp_path)
    with pytest.raises(CompileError, match="XLA cannot compile main"):
        compiler.compile(bytecode(), "main", {"no_such_option": True})


def test_levels_that_this_host_has_say_so() -> None:
    for level in ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"):
        target = Target.parse(f"cpu:{level}")
        assert target.runs_here() == (set(target.features) <= set(host_features()))


def test_protobuf_fields() -> None:
    # field 1 varint 300, field 2 fixed64, field 3 fixed32, field 4 "ab", field 20 "c"
    message = b"\x08\xac\x02" + b"\x11" + bytes(8) + b"\x1d" + bytes(4) + b"\x22\x02ab" + b"\xa2\x01\x01c"
    assert xla_targets._field(message, 4) == b"ab"
    assert xla_targets._field(message, 20) == b"c"
    assert xla_targets._position(message, 4) == 17
    with pytest.raises(CompileError, match="no field 5"):
        xla_targets._field(message, 5)
    long = b"x" * 300
    assert xla_targets._field(xla_targets._message(20, long) + xla_targets._message(4, b"y"), 20) == long


def test_a_mesh_on_a_host_with_fewer_devices_names_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_targets, "attached", lambda platform: ("sm_90",))
    with pytest.raises(
        ConfigError, match="for cuda:sm_90:1x1x2 runs on 2 devices together, and this host has 1"
    ) as error:
        xla_targets.use_device(Target.parse("cuda:sm_90:1x1x2"))
    assert "--devices" in error.value.hint
