"""The sections of an artifact that hold code for a target, and what is known of that code."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from ..cache import mef
from ..cache.key import toolchain
from . import probe, xla, xla_compiler
from .compat import stamp
from .graph import TensorType
from .targets import Target
from .targets.xla_options import Products

Types = tuple[list[TensorType], list[TensorType]]
"""Argument and result types of an executable."""

KINDS = frozenset({mef.COMPAT, mef.MEMORY, mef.COST, mef.PROBE, mef.NATIVE, mef.PROVENANCE})
"""The kinds of these sections; all others are the same for every target of one lowering."""


@dataclass(frozen=True)
class Code:
    """Executables by name, with the types of each; none at all in an artifact that is lowered only.

    seconds: of each phase of the compilation; tuned: whether measurements on such a device chose the kernels
    """

    target: Target
    compiled: Mapping[str, xla_compiler.Compiled]
    types: Mapping[str, Types]
    seconds: Mapping[str, float]
    products: Products = field(default_factory=Products)

    def write(self, writer: mef.MefWriter) -> None:
        """Adds every section of `KINDS`."""
        form = "native" if self.compiled else "lowered"
        tuned = "no" if self.products.autotune is None else "yes"
        made = stamp(self.target, uses_vendor_blas=self.products.use_vendor_blas)
        writer.add_json(mef.COMPAT, "", made | {"form": form, "tuned": tuned})
        writer.add_json(mef.MEMORY, "", {name: found.memory for name, found in self.compiled.items()})
        cost = {name: {"flops": int(c.flops), "bytes": int(c.bytes_accessed)} for name, c in self.compiled.items()}
        writer.add_json(mef.COST, "", cost)
        writer.add_json(mef.PROBE, "", self._probe())
        for name, found in self.compiled.items():
            writer.add(mef.NATIVE, name, found.executable, target=self.target.name, codec="none")
        writer.add_json(mef.PROVENANCE, "", self._provenance())

    def _probe(self) -> dict[str, Any]:
        """Expected results of the smallest executables, from what was just compiled, where this host can run it."""
        known = {name: self.types[name] for name in self.compiled} if self.target.runs_here() else {}
        chosen = sorted(known, key=lambda name: sum(type.nbytes for type in known[name][0]))[:8]
        results = {}
        for name in filter(lambda name: probe.fits([*known[name][0], *known[name][1]]), chosen):
            arguments, outputs = known[name]
            executable = xla.load_executable(self.compiled[name].executable, outputs)
            results[name] = probe.run(executable, name, arguments)
        return {"tolerance": probe.TOLERANCE, "results": results}

    def _provenance(self) -> dict[str, Any]:
        return {
            "project": __version__,
            "toolchain": toolchain(self.target.xla_platform),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
            "seconds": {phase: f"{seconds:.3f}" for phase, seconds in self.seconds.items()},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
