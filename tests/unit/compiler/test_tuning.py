"""Measurements of kernels: files joined, what cannot be measured refused, and the device's own compiler asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from max import CompileError, ConfigError
from max.cache.mef import Mef, MefWriter
from max.compiler import Graph, Module, Target, TensorType, tuning
from max.compiler.artifact import compile_module
from max.compiler.compile_messages import Job
from max.compiler.compile_process import compiling
from max.compiler.finish import sources_of

F = TensorType("float32", (8, 8))
FIRST = """\
version: 3
results {
  device: "CUDA: 9.0"
  hlo: "a"
  result { triton { block_m: 16 block_n: 32 } }
}
"""
SECOND = FIRST.replace('"a"', '"b"')


def test_files_are_joined_under_one_version_and_nothing_stands_twice() -> None:
    joined = tuning.merge_results([FIRST, SECOND, FIRST])
    assert joined.count("version: 3") == 1 and joined.startswith("version: 3\n")
    assert (joined.count('hlo: "a"'), joined.count('hlo: "b"')) == (1, 1)
    assert tuning.merge_results([joined]).count("results {") == 2


def test_files_of_different_forms_are_not_joined() -> None:
    with pytest.raises(CompileError, match="version: 2, version: 3"):
        tuning.merge_results([FIRST, FIRST.replace("version: 3", "version: 2")])


@pytest.mark.parametrize(
    ("name", "why"),
    [("cpu", "is for GPUs, and cpu:native is none"), ("tpu", "is for GPUs, and tpu:v5e is none"),
     ("cuda:sm_90", "this host has no cuda:sm_90 to measure kernels on")],
)  # fmt: skip
def test_only_a_gpu_of_this_host_measures(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "attached", lambda platform: ())
    with pytest.raises(ConfigError, match=why):
        tuning.require_device(Target.parse(name))
    monkeypatch.setattr(tuning, "attached", lambda platform: ("sm_90",))
    tuning.require_device(Target.parse("cuda:sm_90"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Mef:
    path = tmp_path_factory.mktemp("artifact") / "a.mef"
    module = Module("m")
    Graph("main", lambda x: x @ x, [F], module=module)
    with MefWriter(path) as writer:
        compile_module(module, Target.parse("cpu"), writer)
    return Mef.open(path)


def test_the_device_compiles_in_a_process_of_its_own(artifact: Mef) -> None:
    """On the one device that is everywhere, the CPU."""
    with compiling(Target.parse("cpu"), 1, on_device=True) as process:
        for name, source in sources_of(artifact).items():
            process.submit(Job(name, source, {}))
        answers = list(process.answers())
    assert answers and all(answer.executable and answer.flops >= 8 * 8 * 8 * 2 for answer in answers)


def test_nothing_measured_is_told_and_leaves_no_file(artifact: Mef, tmp_path: Path) -> None:
    told: list[tuple[str, str, int, int]] = []
    with pytest.raises(CompileError, match="XLA measured no kernels for cpu:native"):
        tuning.record(artifact, Target.parse("cpu"), tmp_path / "results", lambda *each: told.append(each))
    assert told[-1][0] == "measure" and told[-1][2] == told[-1][3]
    assert not list(tmp_path.iterdir())


def test_measurements_are_written_as_a_whole(artifact: Mef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that writes what XLA does where it is told to."""
    monkeypatch.setattr(tuning, "compiling", lambda *_, **__: Measuring())
    tuning.record(artifact, Target.parse("cuda:sm_90"), tmp_path / "results", lambda *_: None)
    assert (tmp_path / "results").read_text() == FIRST
    with pytest.raises(ConfigError, match="none/results cannot be written"):
        tuning.record(artifact, Target.parse("cuda:sm_90"), tmp_path / "none/results", lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


class Measuring:
    """A compile process on a device."""

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, job: Job) -> None:
        Path(str(job.options["xla_gpu_dump_autotune_results_to"])).write_text(FIRST)

    def answer(self) -> None:
        pass
