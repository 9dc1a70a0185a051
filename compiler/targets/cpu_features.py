"""The instruction sets of CPUs: those of this host, and those that the code of a level may use."""

from __future__ import annotations

import functools
from pathlib import Path

from . import spec_files

# Instruction sets by their names in /proc/cpuinfo that LLVM may use; what only tunes or virtualizes is left out.
_ISA_FLAGS = frozenset(
    """
    sse sse2 pni ssse3 sse4_1 sse4_2 sse4a popcnt cx16 lahf_lm movbe aes pclmulqdq sha_ni gfni vaes vpclmulqdq avx
    avx2 fma f16c bmi1 bmi2 abm adx rdrand rdseed fsgsbase xsave xsaveopt xsavec xsaves clflushopt clwb clzero
    avx512f avx512dq avx512cd avx512bw avx512vl avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg
    avx512_vpopcntdq avx512_bf16 avx512_fp16 avx512_vp2intersect avx_vnni avx_vnni_int8 avx_ne_convert avx_ifma
    amx_tile amx_int8 amx_bf16 amx_fp16 rdpid serialize movdiri movdir64b asimd asimdhp asimddp asimdrdm fp fphp
    atomics crc32 dotprod bf16 i8mm sve sve2 svebf16 svei8mm sme lm cmov cx8 fxsr mmx
    """.split()
)


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


@functools.cache
def level_features(arch: str) -> tuple[str, ...]:
    """LLVM's names of the features that code for a level or a CPU of the data file may use, sorted."""
    row = spec_files.read("cpu")["arch"][arch]
    inherited = level_features(row["base"]) if row["base"] else ()
    return tuple(sorted({*inherited, *row["adds"][0]}))


@functools.cache
def level_flags(arch: str) -> tuple[str, ...]:
    """The same features as Linux lists them in /proc/cpuinfo, to be compared with `host_features`."""
    flags = spec_files.read("cpu")["flags"]
    named = (flags[name][0] if name in flags else name for name in level_features(arch))
    return tuple(sorted(name for name in named if name))
