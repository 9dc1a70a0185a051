"""The instruction sets of CPUs: those of this host, and those that the code of a level may use."""

from __future__ import annotations

import functools
from pathlib import Path

from . import spec_files

ISA_FLAGS = frozenset([
    "abm", "adx", "aes", "amx_bf16", "amx_fp16", "amx_int8", "amx_tile", "asimd", "asimddp", "asimdhp", "asimdrdm",
    "atomics", "avx", "avx2", "avx512_bf16", "avx512_bitalg", "avx512_fp16", "avx512_vbmi2", "avx512_vnni",
    "avx512_vp2intersect", "avx512_vpopcntdq", "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512ifma",
    "avx512vbmi", "avx512vl", "avx_ifma", "avx_ne_convert", "avx_vnni", "avx_vnni_int8", "bf16", "bmi1", "bmi2",
    "clflushopt", "clwb", "clzero", "cmov", "crc32", "cx16", "cx8", "dotprod", "f16c", "fma", "fp", "fphp",
    "fsgsbase", "fxsr", "gfni", "i8mm", "lahf_lm", "lm", "mmx", "movbe", "movdir64b", "movdiri", "pclmulqdq", "pni",
    "popcnt", "rdpid", "rdrand", "rdseed", "serialize", "sha_ni", "sme", "sse", "sse2", "sse4_1", "sse4_2", "sse4a",
    "ssse3", "sve", "sve2", "svebf16", "svei8mm", "vaes", "vpclmulqdq", "xsave", "xsavec", "xsaveopt", "xsaves",
])  # fmt: skip
"""Instruction sets by their names in /proc/cpuinfo that LLVM may use; what only tunes or virtualizes is left out."""


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
            return tuple(sorted(ISA_FLAGS.intersection(value.split())))
    return ()


@functools.cache
def level_features(arch: str) -> tuple[str, ...]:
    """LLVM's names of the features that code for a level or a CPU of the data file may use, sorted."""
    row = spec_files.read("cpu")["arch"][arch]
    base = row["base"][0]
    inherited = level_features(base) if base else ()
    return tuple(sorted({*inherited, *row["adds"][0]}))


@functools.cache
def level_flags(arch: str) -> tuple[str, ...]:
    """The same features as Linux lists them in /proc/cpuinfo, to be compared with `host_features`."""
    flags = spec_files.read("cpu")["flags"]
    named = (flags[name][0] if name in flags else name for name in level_features(arch))
    return tuple(sorted(name for name in named if name))
