"""A target: a platform, an architecture of it, and how many devices; `parse` reads what `--target` takes."""

from __future__ import annotations

import functools
import platform as host_platform
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from ... import ConfigError
from . import cpu_features, spec_files

Lowering = Literal["cpu", "gpu", "xla"]
"""What the graphs of models/ are written with: the project's kernels for CPUs or for GPUs, or plain XLA."""

_DEFAULTS = {"cuda": "sm_80", "hip": "gfx942", "tpu": "v5e", "cpu": "native"}
_LOWERINGS: dict[str, Lowering] = {"cpu": "cpu", "cuda": "gpu"}
_XLA_PLATFORMS = {"hip": "rocm"}
_MESH = re.compile(r"1x1x([1-9]\d*)")
_MAX_DEVICES = 64


@dataclass(frozen=True)
class Target:
    """What code is compiled for.

    arch:     as in the data files, or "native" for the CPU of this host
    topology: the chips that a TPU host has, as "2x2"; the mesh of several GPUs, data x expert x tensor, as "1x1x2"
    features: the instruction sets that code for a CPU may use, by their names in /proc/cpuinfo
    """

    platform: str
    arch: str
    topology: str = ""
    features: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> Target:
        """Reads `<platform>[:<arch>[:<topology>]]`; raises ConfigError naming near targets and all that exist."""
        if text in ("cpu", "cpu:native"):
            return Target("cpu", "native", features=cpu_features.host_features())
        gpu, _, mesh = text.rpartition(":")
        if gpu.startswith("cuda:") and gpu in target_names() and (found := _MESH.fullmatch(mesh)):
            return Target.parse(gpu).over(int(found[1]))
        if text not in target_names():
            raise _unknown(text)
        platform, arch, topology = [*text.split(":"), "", ""][:3]
        arch = arch or _DEFAULTS[platform]
        if platform == "cpu":
            return Target(platform, arch, features=cpu_features.level_flags(arch))
        if platform == "tpu":
            return Target(platform, arch, topology or _topologies(arch)[0])
        return Target(platform, arch)

    def over(self, devices: int) -> Target:
        """The same for a mesh of so many devices, which compute each layer together; raises ConfigError."""
        if devices == 1:
            return self
        if self.platform != "cuda":
            raise ConfigError(
                f"a model cannot be split over {devices} devices of {self.name}: only NVIDIA's GPUs make a mesh yet",
                "Give one device.",
            )
        if devices > _MAX_DEVICES:
            raise ConfigError(
                f"a mesh of {devices} devices is not there: a host has at most {_MAX_DEVICES}", "Give fewer devices."
            )
        return replace(self, topology=f"1x1x{devices}")

    @property
    def devices(self) -> int:
        """How many devices execute the code together, each with its part of the weights and pages."""
        found = _MESH.fullmatch(self.topology)
        return int(found[1]) if found else 1

    @property
    def name(self) -> str:
        parts = [self.platform, self.arch]
        if self.topology and (self.platform != "tpu" or self.topology != _topologies(self.arch)[0]):
            parts.append(self.topology)
        return ":".join(parts)

    @property
    def xla_platform(self) -> str:
        """The platform as XLA and jax call it: cpu, cuda, rocm or tpu."""
        return _XLA_PLATFORMS.get(self.platform, self.platform)

    @property
    def is_native(self) -> bool:
        """Whether this is the CPU of this host, as it is."""
        return (self.platform, self.arch) == ("cpu", "native")

    @property
    def lowering(self) -> Lowering:
        """The kernels that graphs for this target are written with."""
        return _LOWERINGS.get(self.platform, "xla")

    @property
    def smallest_step(self) -> int:
        """The fewest tokens that a step is compiled for: on devices, eight cost no more than one."""
        return 1 if self.platform == "cpu" else 8

    @property
    def figures(self) -> dict[str, Any]:
        """What the data files say of the architecture; empty for the CPU of this host."""
        return {} if self.is_native else spec_files.figures(self.platform, self.arch)

    @property
    def memory_sizes(self) -> tuple[int, ...]:
        """Bytes of memory of the smallest device of the architecture that servers have, and of the one that `figures`
        describe, where they differ; not for CPUs."""
        return spec_files.memory_sizes(self.platform, self.arch)

    def spec(self) -> dict[str, Any]:
        """The target's part of the key: all that decides which code is made."""
        if self.platform == "cpu":
            machine = host_platform.machine() if self.is_native else "x86_64"
            return {"platform": "cpu", "arch": self.arch, "machine": machine, "features": list(self.features)}
        topology = {"topology": self.topology} if self.topology else {}
        versions = spec_files.versions(self.platform)
        return {"platform": self.platform, "arch": self.arch, **topology, "figures": self.figures, "versions": versions}

    def runs_here(self) -> bool:
        """Whether the CPU of this host can run the code."""
        return self.platform == "cpu" and not set(self.features) - set(cpu_features.host_features())

    def missing_features(self, required: list[str]) -> list[str]:
        """The instruction sets among `required` that this target lacks: code that needs them must not run on it."""
        return sorted(set(required) - set(self.features))


@functools.cache
def target_names() -> tuple[str, ...]:
    """All that `Target.parse` takes: each platform alone, with each architecture, and with each topology."""
    names = []
    for platform in spec_files.PLATFORMS:
        names.append(platform)
        names += ["cpu:native"] if platform == "cpu" else []
        for arch in spec_files.architectures(platform):
            names.append(f"{platform}:{arch}")
            names += [f"{platform}:{arch}:{topology}" for topology in _topologies(arch)] if platform == "tpu" else []
    return tuple(names)


def _topologies(arch: str) -> list[str]:
    """The topologies of a TPU, the single chip first."""
    return spec_files.figures("tpu", arch)["topologies"]


def _unknown(text: str) -> ConfigError:
    names = target_names()
    near = get_close_matches(text.lower(), names, n=3, cutoff=0.6)
    if not near:
        # Perhaps an architecture alone, or one that this platform does not have.
        tail = text.lower().rpartition(":")[2]
        near = [name for name in names if name.endswith(f":{tail}") or (tail and name == text.partition(":")[0])]
    guess = f"Did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(f"there is no target {text!r}", f"{guess}There are: {', '.join(names)}.")
