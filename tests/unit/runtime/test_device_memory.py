"""What a pipeline may take of a device: figures and drivers, weights of one part, and what does not fit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from max import CapacityError, ConfigError
from max.compiler import Target
from max.compiler.limits import Limits
from max.compiler.targets import attached
from max.models.llama_config import Config
from max.models.rope import Rope
from max.runtime import device_memory
from max.runtime.config import BatchConfig, ModelConfig
from max.runtime.device_memory import bytes_needed, check_host, check_loaded, memory_budgets, room_for_pages
from max.runtime.model import TensorSpec
from max.runtime.wanted import limits_of

HOPPER = Target.parse("cuda:sm_90")
LLAMA = Config(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 8192, Rope(128, 500000.0))
PARAMETERS, PAGE_BYTES = 8_030_261_248, 2 * 2 * 32 * 1024 * 128  # of Llama 3 8B; a page of 128 tokens in bfloat16


def limits(target: Target, config: Config = LLAMA, **batch: Any) -> Limits:
    weights = config.weights().made_of("bfloat16").by_output().split(config.sharding(target.devices))
    return limits_of(config, ModelConfig(), BatchConfig(**batch), target, weights, "bfloat16")


def test_a_share_of_what_data_files_say_or_the_driver_if_that_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    h100, h200 = HOPPER.memory_sizes
    assert memory_budgets(HOPPER, None) == (int(0.9 * h100), int(0.9 * h200))
    assert memory_budgets(HOPPER, 0.5) == (h100 // 2, h200 // 2)
    for here, counted in (
        ((h200 - 10**9,), (h100, h200)),
        ((h200 * 2,), (h100, h200)),
        ((h100 + 10**9,), (h100, h100 + 10**9)),
        ((h200, 40 * 10**9), (40 * 10**9,)),
    ):
        monkeypatch.setattr(attached, "memory", lambda platform, arch, here=here: here)
        assert memory_budgets(HOPPER, 1.0) == counted


def test_one_artifact_serves_all_devices_of_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    anywhere = limits(HOPPER)
    for memory in HOPPER.memory_sizes:
        monkeypatch.setattr(attached, "memory", lambda platform, arch, memory=memory: (memory,))
        assert limits(HOPPER) == anywhere


def test_what_only_larger_devices_hold_is_counted_for_them() -> None:
    small, large = HOPPER.memory_sizes
    weights = 2 * PARAMETERS
    tokens = int((0.8 * large - weights) / PAGE_BYTES) * 128
    assert tokens * PAGE_BYTES / 128 > small
    assert limits(HOPPER, max_batch_total_tokens=tokens).num_pages * 128 >= tokens
    heavy = replace(LLAMA, num_layers=170)  # 78 GB of weights
    assert limits(HOPPER, heavy).num_pages * PAGE_BYTES * 170 // 32 > 0.9 * (0.9 * large - 80e9)


def test_a_cpu_has_a_share_only_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_memory, "_CGROUP_LIMIT", tmp_path / "memory.max")
    cpu, memory = Target.parse("cpu"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_budgets(cpu, None) == () and memory_budgets(cpu, 0.25) == (memory // 4,)
    for text, counted in (("max\n", memory), (f"{1 << 20}\n", 1 << 20), (f"{memory * 2}\n", memory)):
        (tmp_path / "memory.max").write_text(text)
        assert memory_budgets(cpu, 1.0) == (counted,)
    with pytest.raises(ConfigError, match="cpu:x86-64-v3 may be another's"):
        memory_budgets(Target.parse("cpu:x86-64-v3"), 0.5)


def test_pages_fill_what_the_weights_of_8b_leave() -> None:
    found = limits(HOPPER)
    left = 0.9 * HOPPER.memory_sizes[0] - 2 * PARAMETERS
    assert 0.9 * left < found.num_pages * PAGE_BYTES < left - (1 << 30)
    assert limits(HOPPER, device_memory_utilization=0.89).num_pages <= found.num_pages
    assert limits(HOPPER, device_memory_utilization=0.45).num_pages < 0.5 * found.num_pages


def test_two_devices_hold_more_than_twice_the_tokens() -> None:
    """Each has half of the weights, and of each page."""
    one, two = limits(HOPPER), limits(HOPPER.over(2))
    assert 2 * one.num_pages < two.num_pages < 2.6 * one.num_pages


def test_the_estimate_of_a_step_is_near_what_xla_takes() -> None:
    """61 MB for 512 tokens of the 8B model (docs/adr/0014-the-step-graph-for-gpus.md); 48 since norms have kernels."""
    weights = LLAMA.weights().made_of("bfloat16").by_output()
    rooms = [
        room_for_pages(10**11, HOPPER, weights, tokens=tokens, rows=8, vocab_size=128256) for tokens in (512, 1024)
    ]
    assert 0.9 * 61e6 < rooms[0] - rooms[1] < 1.2 * 61e6


@pytest.mark.parametrize(
    ("target", "changes", "batch", "what"),
    [
        (
            "cuda:sm_86",
            {"num_layers": 160},
            {},
            "the model does not fit cuda:sm_86: of 45.9 GB that may be used, weights",
        ),
        ("tpu:v5e", {"num_layers": 27}, {}, "for one request of 8192 tokens take .* and weights leave .* of tpu:v5e"),
        ("cuda:sm_90", {}, {"max_batch_total_tokens": 10**7}, "for --max-batch-total-tokens take .* of cuda:sm_90"),
    ],
)
def test_what_does_not_fit_is_refused(target: str, changes: dict[str, int], batch: dict[str, int], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        limits(Target.parse(target), replace(LLAMA, **changes), **batch)
    assert "--device-memory-utilization" in caught.value.hint


def artifact(**memory: int) -> Any:
    """Two graphs that share a weight of 4 KB and a state of 2 KB."""
    weight, state = TensorSpec("w", "float32", (1024,)), TensorSpec("s", "float32", (512,))
    graph = SimpleNamespace(weights=[weight], state=[state])
    told = {name: {"temporary": nbytes} for name, nbytes in memory.items()}
    graphs = {"a": graph, "b": SimpleNamespace(weights=[weight], state=[])}
    return SimpleNamespace(target="cuda:sm_90", graphs=graphs, artifact=SimpleNamespace(json=lambda kind: told))


def test_a_start_compares_what_the_artifact_takes_with_the_device() -> None:
    compiled = artifact(a=1000, b=3000)
    assert bytes_needed(compiled) == 4096 + 2048 + 3000
    check_loaded(compiled, None)
    check_loaded(compiled, 9144)
    with pytest.raises(CapacityError, match=r"the artifact for cuda:sm_90 takes .* of each device, and this one gives"):
        check_loaded(compiled, 9143)


def test_more_pages_than_the_machine_has_memory_for_are_refused_before_they_are_taken() -> None:
    check_host([TensorSpec("pages", "bfloat16", (1024, 1024))])
    with pytest.raises(CapacityError, match=r"take 4,398.0 GB, and this machine has [\d.,]+ GB") as caught:
        check_host([TensorSpec("a", "float32", (1 << 39,)), TensorSpec("b", "float32", (1 << 39,))])
    assert "--max-batch-total-tokens" in caught.value.hint
