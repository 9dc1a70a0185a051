"""Compiles the built-in model for every target: `python -m max.bench.targets > docs/targets.md`.

Each is compiled by `max warm-cache` as a user would, into an empty cache and then once more from the full one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..cache import mef
from ..cache.scratch import Scratch
from ..compiler.targets.listing import TargetRow, target_rows

_HEAD = """\
# Targets

Written by `python -m max.bench.targets`; the text below the table is part of it.

`max warm-cache --target cuda:sm_90` compiles a model for hardware that is not there; several targets may be given at
once. The built-in model under the default settings, with nothing in the cache and then with everything,
on {host}:

| target | hardware | cold, s | cached, s | executables | code, MB | artifact, MB |
|---|---|---|---|---|---|---|
"""
_TAIL = """
Seconds are of the whole command, from its start to its exit, each run alone. Steps for NVIDIA's GPUs are one executable
each, with kernels of our own; those for other devices are graphs of plain XLA.

## What is installed for it

`max list --targets` says what each target needs and whether this host can compile and run it. The extras hold the least
that compiles: `cuda` a plugin, NVIDIA's assembler and its library of device functions; `rocm` a plugin, for which
stand-ins of the ROCm libraries are written where ROCm is not installed; `tpu` libtpu. CPU levels need nothing.
`make test-targets` installs all of them apart from `.venv`, 3 GB, and compiles for every target.
`cuda-run` is for machines with a GPU. Compiling needs no driver, no cuDNN and no cuBLAS.

## How it is done

- A target is a platform, an architecture and, for TPUs, a topology. Its figures stand in `compiler/targets/specs/`,
  each with its source, and are factors of the key; `max list --targets --json` names those that no document says of
  the very product.
- Several of NVIDIA's GPUs compute each layer together as `cuda:sm_90:1x1x2`, a mesh of data x expert x tensor; the last
  alone may be more than 1. `--target cuda:sm_90 --devices gpu:0,1` means the same. The artifact needs as many devices,
  each with its part of weights and pages. No mesh of GPUs has run any yet.
- Pages fill what weights leave of the memory in the data file, `--device-memory-utilization` of it.
- The graphs are lowered for the platform here; XLA's plugin compiles them in a process of its own. A crash there is an
  error of two lines, and an interrupt leaves no half entry.
- An artifact's `compat` section says what its code needs: platform and architecture, instruction sets, the versions of
  jaxlib and plugin that made it, and the least versions of toolkit and cuDNN. A start compares them with the host
  before XLA sees the code, and names both sides where they differ.
- `cpu:x86-64-v3` and the other levels run on every host that has the instruction sets of the level. The kernels choose
  theirs at run time, so that such an artifact is nearly as fast as a native one.
- `--portable` keeps StableHLO without code, marked `lowered`. It needs no compiler for the target; the first start on
  such a device compiles it and keeps the result.
- `--autotune-results FILE` brings measurements along by which XLA chooses kernels, and the artifact says `tuned: yes`.
  A machine with such a GPU makes them: `max warm-cache --devices gpu --record-autotune-results FILE`. Compiling
  alone measures nothing, there as little as elsewhere. No GPU has recorded any yet.
- Without measurements XLA would give every product for NVIDIA's GPUs the smallest tiles; those of steps are set here,
  and its cost model chooses the rest. For AMD's it would take small ones too, or on RDNA such as the registers cannot
  hold; others are set.
"""


@dataclass(frozen=True)
class Measured:
    """What compiling for a target took: seconds of the commands, and bytes of what they made."""

    cold_seconds: float
    cached_seconds: float
    executables: int
    code_bytes: int
    artifact_bytes: int


def measure(target: str) -> Measured:
    """Runs the command cold and cached in a cache of its own; raises CalledProcessError for one that fails."""
    with Scratch("bench") as scratch:
        cold, made = _warm(target, str(scratch.path))
        cached, again = _warm(target, str(scratch.path))
        assert again["cached"], "the second run finds what the first one made"
        sections = mef.Mef.open(made["artifact_path"]).sections()
        code = sum(section.stored_bytes for section in sections if section.kind == mef.NATIVE)
        return Measured(cold, cached, made["executables"], code, made["artifact_bytes"])


def _warm(target: str, folder: str) -> tuple[float, dict]:
    command = [sys.executable, "-m", "max", "warm-cache", "--target", target, "--cache-dir", folder, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started, json.loads(done.stdout)


def line(row: TargetRow, found: Measured) -> str:
    """A row of the table."""
    return (
        f"| `{row.target}` | {row.hardware or row.target.partition(':')[2]} | {found.cold_seconds:.1f} "
        f"| {found.cached_seconds:.2f} | {found.executables} | {found.code_bytes / 1e6:.1f} "
        f"| {found.artifact_bytes / 1e6:.1f} |"
    )


def _host() -> str:
    model = ""
    for text in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if text.startswith("model name"):
            model = text.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} CPUs ({model or platform.machine()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="targets that start like this")
    only = parser.parse_args().only
    rows = [row for row in target_rows() if row.can_compile and row.target.startswith(only or "")]
    print(_HEAD.format(host=_host()), end="", flush=True)
    for row in rows:
        print(line(row, measure(row.target)), flush=True)
    print(_TAIL, end="")


if __name__ == "__main__":
    main()
