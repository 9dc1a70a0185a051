"""Targets are parsed with near matches, and tell which instruction sets are missing."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from max import ConfigError
from max.compiler.target import TARGETS, Target, host_features


@pytest.mark.parametrize("text", TARGETS)
def test_every_target_parses_to_this_host(text):
    target = Target.parse(text)
    assert (target.name, target.features) == ("cpu:native", host_features())
    assert target.spec() == {
        "platform": "cpu",
        "arch": "native",
        "machine": platform.machine(),
        "features": list(host_features()),
    }


@pytest.mark.parametrize(
    ("text", "hint"),
    [("cpu:natve", "Did you mean cpu:native?"), ("cpx", "Did you mean cpu?"), ("cuda:sm_90", "There are: cpu, ")],
)
def test_unknown_targets_name_near_ones_and_all(text, hint):
    with pytest.raises(ConfigError, match="cannot be compiled for") as caught:
        Target.parse(text)
    assert hint in caught.value.hint


def test_missing_features():
    target = Target("cpu", "native", ("avx2", "fma"))
    assert target.missing_features(["fma", "avx2"]) == []
    assert target.missing_features(["avx512f", "fma", "amx_tile"]) == ["amx_tile", "avx512f"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists instruction sets there")
def test_host_features_are_those_of_the_kernel_without_what_only_virtualizes():
    words = set(Path("/proc/cpuinfo").read_text().split())
    features = host_features()
    assert list(features) == sorted(set(features))
    assert set(features) <= words
    assert {"sse2", "fp"} & set(features), "x86-64 has sse2, arm64 has fp"
    assert not {"hypervisor", "constant_tsc", "vmx"} & set(features)
