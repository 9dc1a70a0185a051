"""The samplers compiled for a GPU that is not here: one kernel takes the tokens, whatever the settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from max.compiler import Module, Target, xla_lowering
from max.compiler.compile_messages import Job
from max.compiler.compile_process import compiling
from max.compiler.targets.toolchain import missing, why_not
from max.compiler.targets.xla_options import xla_options
from max.models.sampler import add_samplers

ROWS, VOCAB, BATCH = 8, 128256, 16


@pytest.mark.parametrize(
    ("graph", "kernel", "most"),
    [("sample_greedy", "argmax", 1), ("sample_full", "sample", 4), ("sample_logprobs", "highest", 3)],
)
@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_90"])
def test_a_draw_is_a_few_launches(name: str, graph: str, kernel: str, most: int, tmp_path: Path) -> None:
    target = Target.parse(name)
    if reason := why_not(target):
        pytest.skip(reason)
    if absent := missing(target):
        pytest.skip(f"{' and '.join(absent)} not installed")
    module = Module("samplers")
    add_samplers(module, ROWS, VOCAB, BATCH, "gpu")
    lowered = xla_lowering.lower(module.graphs[f"{graph}_r{ROWS}"], target.xla_platform).stablehlo
    with compiling(target, 1) as process:
        process.submit(Job("main", lowered, xla_options(target, "main"), str(tmp_path)))
        answer = process.answer()
    (file,) = tmp_path.glob("*.thunk_sequence.txt")
    launches = re.findall(r"^\s*\d+:\s*(k\w+)", file.read_text(), re.M)
    print(f"{name} {graph}: {launches}, {len(answer.executable)} bytes of code, {answer.memory}")
    assert set(launches) == {"kCustomKernel"} and len(launches) <= most
    called = re.findall(r"\.entry (\w+)\(", "".join(path.read_text() for path in tmp_path.glob("*.ptx")))
    assert kernel in called
    assert " sort(" not in answer.optimized_hlo and " while(" not in answer.optimized_hlo
    assert answer.memory["temporary"] <= 2 * 4 * ROWS * VOCAB
