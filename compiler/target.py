"""What modules are compiled for. Today the CPU of this host; other platforms join in `parse` and `_SPECS`."""

from __future__ import annotations

import functools
import platform as host_platform
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .. import ConfigError

# Instruction sets by their names in /proc/cpuinfo that LLVM may use; what only tunes or virtualizes is left out.
_ISA_FLAGS = frozenset(
    [
        "sse",
        "sse2",
        "pni",
        "ssse3",
        "sse4_1",
        "sse4_2",
        "sse4a",
        "popcnt",
        "cx16",
        "lahf_lm",
        "movbe",
        "aes",
        "pclmulqdq",
        "sha_ni",
        "gfni",
        "vaes",
        "vpclmulqdq",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "bmi1",
        "bmi2",
        "abm",
        "adx",
        "rdrand",
        "rdseed",
        "fsgsbase",
        "xsave",
        "xsaveopt",
        "xsavec",
        "xsaves",
        "clflushopt",
        "clwb",
        "clzero",
        "avx512f",
        "avx512dq",
        "avx512cd",
        "avx512bw",
        "avx512vl",
        "avx512ifma",
        "avx512vbmi",
        "avx512_vbmi2",
        "avx512_vnni",
        "avx512_bitalg",
        "avx512_vpopcntdq",
        "avx512_bf16",
        "avx512_fp16",
        "avx512_vp2intersect",
        "avx_vnni",
        "avx_vnni_int8",
        "avx_ne_convert",
        "avx_ifma",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "amx_fp16",
        "rdpid",
        "serialize",
        "movdiri",
        "movdir64b",
        "asimd",
        "asimdhp",
        "asimddp",
        "asimdrdm",
        "fp",
        "fphp",
        "atomics",
        "crc32",
        "dotprod",
        "bf16",
        "i8mm",
        "sve",
        "sve2",
        "svebf16",
        "svei8mm",
        "sme",
    ]
)

TARGETS = ("cpu", "cpu:native")
"""What `--target` takes today."""


@dataclass(frozen=True)
class Target:
    """A platform and an architecture of it; `features` are the instruction sets that its code may use."""

    platform: str
    arch: str
    features: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> Target:
        """Reads `<platform>[:<arch>]`; raises ConfigError naming near targets and all that exist."""
        if text in TARGETS:
            return Target("cpu", "native", host_features())
        near = get_close_matches(text, TARGETS, n=1, cutoff=0.5)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"target {text!r} cannot be compiled for by this version", f"{guess}There are: {', '.join(TARGETS)}."
        )

    @property
    def name(self) -> str:
        return f"{self.platform}:{self.arch}"

    def spec(self) -> dict[str, Any]:
        """The target's part of the key: all that decides which code is made."""
        return {
            "platform": self.platform,
            "arch": self.arch,
            "machine": host_platform.machine(),
            "features": list(self.features),
        }

    def missing_features(self, required: list[str]) -> list[str]:
        """The instruction sets among `required` that this target lacks: code that needs them must not run on it."""
        return sorted(set(required) - set(self.features))


@functools.cache
def host_features() -> tuple[str, ...]:
    """The instruction sets of this host's CPU, sorted; empty where the kernel does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(_ISA_FLAGS.intersection(value.split())))
    return ()
