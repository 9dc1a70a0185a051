"""Makes the artifact that no cache has: from StableHLO that is stored, or else by tracing the model.

Only here are flax and the architectures imported.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import CacheError
from ..cache import mef
from ..cache.key import Key, lowered_key
from ..cache.mef import Mef
from ..cache.store import Store
from ..compiler import Target, xla_compiler
from ..compiler.dump import Dump
from ..compiler.targets.toolchain import require as require_toolchain
from .ladder import has_same_ir
from .preparation_report import Report
from .wanted import Wanted
from .weight_preparation import Progress


@dataclass(frozen=True)
class Compilation:
    """What artifacts are made for and how; what was done is noted in `report`."""

    store: Store
    target: Target
    report: Report
    progress: Progress
    dump: Dump
    use_subgraphs: bool = True
    portable: bool = False
    """Make StableHLO without code."""
    autotune: Path | None = None
    use_vendor_blas: bool = False

    def make(self, wanted: Wanted) -> bytes:
        """The bytes of the artifact; raises CompileError, and ConfigError where the target's compiler is not there."""
        data = self._finished(wanted.key)
        self.store.counters.made["traced" if data is None else "lowered"] += 1
        return data or self._traced(wanted)

    def _finished(self, key: Key) -> bytes | None:
        """The artifact compiled from StableHLO that is stored; None where none, or a damaged one, is.

        It is what `--portable` has kept, or that of an artifact whose code another compiler or target made.
        """
        source = lowered_key(key.factors)
        stored = None if self.portable else self.store.peek(source)
        if stored is None and not self.portable and (found := self.store.search(has_same_ir(key.factors))):
            stored, source = found.mef, found.key
        if stored is None:
            return None
        try:
            return self._finish(stored)
        except CacheError as error:
            self.store.quarantine(source, error)
            return None

    def _finish(self, stored: Mef) -> bytes:
        require_toolchain(self.target)
        with self.report.timed("import"):
            from ..compiler.artifact import Options
            from ..compiler.finish import finish

        self.report.reason, self.report.compiled = "compiled from stored StableHLO", True
        with self.report.timed("compile"):
            buffer = io.BytesIO()
            options = Options(
                dump=self.dump,
                progress=self.progress,
                autotune=self.autotune,
                use_vendor_blas=self.use_vendor_blas,
            )
            summary = finish(stored, self.target, mef.MefWriter(buffer), options)
        self.report.graphs, self.report.executables = summary.graphs, summary.executables
        xla_compiler.release_memory()
        return buffer.getvalue()

    def _traced(self, wanted: Wanted) -> bytes:
        if not self.portable:
            require_toolchain(self.target)
        with self.report.timed("import"):
            from ..compiler.artifact import Options, compile_module
            from ..models.build import build_text_pipeline

        config, limits = wanted.config, wanted.limits
        self.report.reason, self.report.compiled = "lowered" if self.portable else "compiled", True
        with self.report.timed("compile"):
            devices = self.target.devices
            module = build_text_pipeline(wanted.architecture, config, limits, wanted.weights, devices)
            groups = config.part(devices).cache_groups(limits.page_tokens, limits.page_format)
            options = Options(
                self.use_subgraphs,
                facts={
                    "limits": limits.to_json(),
                    "vocab_size": config.vocab_size,
                    "cache_groups": [asdict(group) for group in groups],
                },
                weights=wanted.weights.to_json(),
                dump=self.dump,
                progress=self.progress,
                portable=self.portable,
                autotune=self.autotune,
                use_vendor_blas=self.use_vendor_blas,
            )
            buffer = io.BytesIO()
            summary = compile_module(module, self.target, mef.MefWriter(buffer), options)
        self.report.graphs, self.report.executables = summary.graphs, summary.executables
        xla_compiler.release_memory()
        return buffer.getvalue()
