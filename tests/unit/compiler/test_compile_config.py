"""The device that a command runs on: this host's CPU, or a GPU that is attached."""

from __future__ import annotations

import pytest

from max import ConfigError
from max.compiler import Target, config
from max.compiler.config import CompileConfig


def test_the_default_is_the_cpu_of_this_host() -> None:
    assert CompileConfig().target() == Target.parse("cpu:native")


@pytest.mark.parametrize("devices", ["cuda:sm_90", "hip", "tpu:v5e", "gpu", "gpu:0"])
def test_devices_that_are_not_here_are_refused(devices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "attached", lambda platform: ())
    with pytest.raises(ConfigError, match=r"this host has no .* to run on") as caught:
        CompileConfig(devices=devices).target()
    assert "max warm-cache --target" in caught.value.hint


def test_gpu_is_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "attached", lambda platform: {"hip": ("gfx942", "gfx90a")}.get(platform, ()))
    assert CompileConfig(devices="gpu").target() == Target.parse("hip:gfx942")
    assert CompileConfig(devices="hip:gfx90a").target() == Target.parse("hip:gfx90a")
    monkeypatch.setattr(config, "attached", lambda platform: ("sm_90",) if platform == "cuda" else ())
    assert CompileConfig(devices="gpu:0").target() == Target.parse("cuda:sm_90")


def test_a_gpu_without_figures_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "attached", lambda platform: ("sm_75",))
    with pytest.raises(ConfigError, match="there is no target 'cuda:sm_75'"):
        CompileConfig(devices="gpu").target()


def test_gpus_are_named_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ("sm_90", "sm_90", "sm_80")
    monkeypatch.setattr(config, "attached", lambda platform: here if platform == "cuda" else ())
    assert CompileConfig(devices="gpu:2").target() == Target.parse("cuda:sm_80")
    both = CompileConfig(devices="gpu:1,0")
    assert (both.target(), both.device_ids) == (Target.parse("cuda:sm_90:1x1x2"), (1, 0))
    assert CompileConfig(devices="gpu").device_ids == CompileConfig().device_ids == ()
    assert CompileConfig(devices="cuda:sm_90:1x1x2").target().devices == 2
    with pytest.raises(ConfigError, match="names GPU 3, and this host has 3 GPUs") as caught:
        CompileConfig(devices="gpu:0,3").target()
    assert "--target cuda:sm_90 --devices gpu:0,3" in caught.value.hint
    with pytest.raises(ConfigError, match="names GPUs that differ: sm_80, sm_90"):
        CompileConfig(devices="gpu:1,2").target()
    with pytest.raises(ConfigError, match="this host has no cuda:sm_90:1x1x4 to run on"):
        CompileConfig(devices="cuda:sm_90:1x1x4").target()


@pytest.mark.parametrize("devices", ["gpu:", "gpu:a", "gpu:0,", "gpu:0,0", "gpu:-1", "gpu:0;1"])
def test_numbers_that_are_none_are_refused(devices: str) -> None:
    with pytest.raises(ValueError, match="give the number of each once"):
        CompileConfig(devices=devices)
