"""From a checkpoint and settings to what a start needs: an artifact and prepared weights, from the cache or made now.

A warm start finds a binding by the checkpoint's identity and the settings, and with it artifact and weights; nothing of
models/ is imported then. Otherwise the architecture's config gives the key of the artifact, which another checkpoint of
the same shape may have filled already; what is still missing is made by one process while others wait for it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from .. import CacheError, ConfigError
from ..cache.binding import Binding, BoundFile, binding_digest, checkpoint_identity
from ..cache.exported import export_to
from ..cache.fields import Section, compile_factors
from ..cache.key import Key, file_digest, lowered_key, make_key, source_digest, toolchain
from ..cache.lease import Waiting
from ..cache.mef import Mef
from ..cache.store import Found, Store
from ..compiler import Target, native
from ..compiler.compat import is_lowered
from ..compiler.dump import Dump
from ..compiler.limits import Limits
from ..compiler.panels import Packing
from ..compiler.stored_stages import dump_stored_stages
from ..compiler.targets.xla_options import Products, xla_options
from ..compiler.weights import Element
from .checkpoint import Checkpoint
from .compilation import Compilation
from .config import BatchConfig, ModelConfig
from .device_memory import memory_budgets
from .ladder import runs_here
from .preparation_report import Prepared, PreparedWeights, Report
from .session import CompiledModels
from .trial import check_sound, vouch
from .wanted import Wanted, limits_of
from .weight_preparation import (
    Progress,
    choose_element,
    choose_packing,
    choose_page_format,
    find_or_prepare,
    weights_of,
)

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
_GRAPH_SOURCES = (_PACKAGE / "compiler", _PACKAGE / "models")
# The factors that decide how prepared weights are laid out.
_OF_WEIGHTS = ("packing", "element", "lowering", "encodings", "kernels", "sources")
# What trained and measured the built-in model: no graph depends on it, which tests/test_architecture.py holds.
_NO_GRAPH_SOURCES = (_PACKAGE / "models" / "builtin",)


@dataclass(frozen=True)
class TextFacts:
    """What the text side knows of a checkpoint, kept in the binding: its files, stop tokens and sampling defaults."""

    files: Sequence[Path] = ()
    stop_token_ids: Sequence[int] = ()
    generation: dict[str, Any] = field(default_factory=dict)


def _silent(phase: str, item: str, done: int, total: int) -> None:
    pass


def unchecked(max_length: int, vocab_size: int) -> None:
    """Finds nothing wrong with any size of context and vocabulary."""


class Preparation:
    """One preparation; `run` is its story."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        store: Store,
        model: ModelConfig,
        batch: BatchConfig,
        target: Target,
        *,
        use_subgraphs: bool = True,
        settings: Sequence[Section] = (),
        text: Callable[[], TextFacts] = TextFacts,
        progress: Progress = _silent,
        dump: Dump | None = None,
        keep_weights: bool = False,
        exact: bool = False,
        portable: bool = False,
        autotune: Path | None = None,
        use_vendor_blas: bool = False,
        check: Callable[[int, int], None] = unchecked,
    ) -> None:
        """settings: every section whose classified fields join the key; keep_weights: fill an arena as well when
        weights have to be prepared, so that a start that goes on to run need not read them back; exact: take no
        artifact that was compiled for less than the target; text: called where a binding is written; portable: make
        StableHLO without code; autotune, use_vendor_blas: see `Products`; check: called with the size of the context
        and of the vocabulary before anything is compiled or prepared, and may raise."""
        self.store, self.model, self.batch, self.target = store, model, batch, target
        self.settings, self.text, self.progress, self.dump = settings, text, progress, dump or Dump()
        self.keep_weights, self.exact, self.check = keep_weights, exact, check
        self.portable, self.autotune = portable, autotune
        if use_vendor_blas:
            xla_options(target, "", Products(use_vendor_blas=True))  # refuses targets that it is not for
        self.report = Report()
        self._compilation = Compilation(
            store, target, self.report, progress, self.dump, use_subgraphs, portable, autotune, use_vendor_blas
        )
        self.checkpoint = checkpoint
        # ModelConfig has refused the encodings that are not there.
        self.encoding: Packing | None = cast("Packing | None", model.quantization_encoding)
        self.packing: Packing = choose_packing(self.encoding, checkpoint, target)
        self.element: Element = choose_element(self.encoding, checkpoint, target)

    def run(self) -> Prepared:
        """Finds or makes both; raises ModelError or WeightError for a checkpoint that cannot be used, and ConfigError
        on a miss under the cache policy `require`."""
        with self.report.timed("lookup"):
            found = self._from_binding()
        if found is None:
            with self.store.lease_named(self._binding_digest, self._from_binding, on_wait=self._on_wait) as lease:
                found = lease.found or self._from_config()
        if self.dump.enabled and not self.report.compiled:
            dump_stored_stages(found.artifact, self.dump)
        return found

    def _on_wait(self, waiting: Waiting) -> None:
        self.progress("wait", waiting.holder, 0, 0)

    # --- the warm path ---

    def _from_binding(self) -> Prepared | None:
        binding = self.binding()
        if binding is None:
            return None
        weights = self.store.prepared_path(binding.prepared)
        if weights is None:
            return None
        try:
            stored = self._lookup(Key(binding.key, binding.factors))
        except ConfigError:
            # The binding may name an artifact that does as well as the one among --precompiled-mefs.
            if not self.store.precompiled:
                raise
            return None
        if stored is None or not self._is_complete(stored.mef):
            return None
        self.report.key, self.report.reason = stored.key.digest, "bound"
        self._export(stored.key, stored.mef)
        ready = PreparedWeights(weights, binding.prepared, None)
        found = Prepared(stored.mef, self.store.artifact_path(stored.mef), ready, self.report)
        self.check(found.limits.max_length, found.compiled.vocab_size)
        return found

    @property
    def _binding_digest(self) -> str:
        # The key has what becomes of the memory, the number of pages, for which the model's config must be known.
        memory = memory_budgets(self.target, self.batch.device_memory_utilization)
        budget = {"memory": list(memory)} if memory else {}
        return binding_digest(self.checkpoint.identity(), self._common_factors() | budget)

    def _common_factors(self) -> dict[str, Any]:
        """What decides an artifact besides the model: known without parsing its config or importing models/."""
        return {
            "settings": compile_factors(*self.settings),
            "target": self.target.spec(),
            "packing": self.packing,
            "element": self.element,
            "lowering": self.target.lowering,
            "kernels": list(native.HANDLERS) if self.packing else [],
            "toolchain": toolchain(self.target.xla_platform),
            "sources": source_digest(_GRAPH_SOURCES, without=_NO_GRAPH_SOURCES),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **({"autotune": file_digest(self.autotune)} if self.autotune else {}),
        }

    def _lookup(self, key: Key) -> Found | None:
        """The stored artifact with every section's hash compared; one that cannot be used is set aside: a miss."""
        found = self.store.find(key, None if self.exact else runs_here(key.factors))
        if found is None:
            return None
        try:
            found.mef.check()
            CompiledModels(found.mef).check(self.target)
            if self.target.runs_here() and not is_lowered(found.mef):
                check_sound(found.mef, self.store.artifact_path(found.mef), self.store)
        except CacheError as error:
            if found.kind == "precompiled":
                raise ConfigError(error.message, "Export one that this host can run.") from error
            self.store.quarantine(found.key, error)
            return None
        return found

    def _export(self, key: Key, artifact: Mef) -> None:
        """Writes the artifact to the folder of --export-mefs, if there is one."""
        if self.store.export_folder is not None:
            export_to(self.store.export_folder, key, artifact, self.store.signed(key.digest, artifact.id))

    # --- the way through the architecture's config ---

    def wanted(self) -> Wanted:
        """What a start with these settings asks for; raises as `run` does for a checkpoint that cannot be used."""
        from ..models import table

        architecture = table.find(self.checkpoint.architecture)
        config = table.load_config(architecture, self.checkpoint.config)
        weights = weights_of(config, self.packing, self.encoding, self.checkpoint, self.target)
        self.checkpoint.check(weights)
        page_format = choose_page_format(self.batch.kv_cache_format, self.packing, self.element)
        limits = limits_of(config, self.model, self.batch, self.target, weights, page_format)
        self.check(limits.max_length, config.vocab_size)
        factors = {
            "architecture": architecture.name,
            "config": asdict(config),  # type: ignore[call-overload]
            "limits": limits.to_json(),
            "encodings": weights.others(self.packing),
            **self._common_factors(),
        }
        key = lowered_key(factors) if self.portable else make_key(factors)
        return Wanted(key, architecture.name, config, limits, weights)

    def binding(self) -> Binding | None:
        """The binding that a warm start would begin with; None when there is none, or a bound file has changed."""
        binding = self.store.lookup_binding(self._binding_digest)
        return None if binding is None or binding.changed_files() else binding

    def _from_config(self) -> Prepared:
        wanted = self.wanted()
        key, artifact = self._artifact(wanted)
        self.report.key = key.digest
        self._export(key, artifact)
        ready = find_or_prepare(
            wanted.weights,
            self.checkpoint,
            self.store,
            self.report,
            self.progress,
            made_by={name: wanted.key.factors[name] for name in _OF_WEIGHTS},
            keep=self.keep_weights,
        )
        if ready.file is not None:
            self._bind(key, artifact, ready.id, wanted.limits)
        return Prepared(artifact, self.store.artifact_path(artifact), ready, self.report)

    def _artifact(self, wanted: Wanted) -> tuple[Key, Mef]:
        """The artifact, and the key that it is stored under."""
        key = wanted.key
        found = self._lookup(key)
        if found is not None:
            self.report.reason = "same shape" if found.kind == "exact" else found.kind
            return found.key, found.mef
        with self.store.lease(key, on_wait=self._on_wait) as lease:
            if lease.found is not None:
                self.report.reason = "made by another process"
                return key, lease.found
            data = self._compilation.make(wanted)
            seconds = self.report.seconds["compile"]
            kept = self.store.publish(key, data, command=" ".join(sys.argv[1:]), seconds=seconds)
        if kept is None:
            return key, Mef.from_bytes(data)
        if self.target.runs_here() and not self.portable:
            vouch(kept, self.store)
        return key, kept

    def _is_complete(self, artifact: Mef) -> bool:
        """Whether an artifact has all that is wanted: one of StableHLO alone is finished where code is."""
        return self.portable or not is_lowered(artifact)

    def _bind(self, key: Key, artifact: Mef, prepared_id: str, limits: Limits) -> None:
        text = self.text()
        try:
            binding = Binding(
                digest=self._binding_digest,
                key=key.digest,
                factors=key.factors,
                checkpoint=checkpoint_identity(self.checkpoint.identity()),
                mef=artifact.id,
                prepared=prepared_id,
                files=tuple(BoundFile.of(path) for path in text.files),
                stop_token_ids=tuple(text.stop_token_ids),
                generation=text.generation,
                max_length=limits.max_length,
                architecture=self.checkpoint.architecture,
                created=time.time(),
                versions=toolchain(self.target.xla_platform),
            )
        except (CacheError, OSError) as error:
            logger.warning("the checkpoint cannot be bound to its artifact: %s", error)
            return
        self.store.publish_binding(binding)
