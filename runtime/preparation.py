"""From a checkpoint and settings to what a start needs: an artifact and prepared weights, from the cache or made now.

A warm start finds a binding by the checkpoint's identity and the settings, and with it artifact and weights; nothing of
models/ is imported then. Otherwise the architecture's config gives the key of the artifact, which another checkpoint of
the same shape may have filled already; what is still missing is made by one process while others wait for it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import CacheError, ConfigError
from ..cache import mef
from ..cache.binding import Binding, BoundFile, binding_digest, checkpoint_identity
from ..cache.fields import Section, compile_factors
from ..cache.key import Key, make_key, source_digest, toolchain
from ..cache.mef import Mef
from ..cache.store import Store
from ..compiler import Target, xla
from ..compiler.dump import Dump
from ..compiler.limits import Limits, choose_limits
from ..compiler.stored_stages import dump_stored_stages
from ..compiler.weights import WeightTable
from . import prepared
from .arena import Arena
from .checkpoint import Checkpoint
from .config import BatchConfig, ModelConfig
from .session import CompiledModels

if TYPE_CHECKING:
    from ..models.table import Config

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
Progress = Callable[[str, str, int, int], None]
"""Called with the phase, the item just finished, and how many of how many are done."""


@dataclass(frozen=True)
class TextFacts:
    """What the text side knows of a checkpoint, kept in the binding: its files, stop tokens and sampling defaults."""

    files: Sequence[Path] = ()
    stop_token_ids: Sequence[int] = ()
    generation: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """What a preparation did, for people. Seconds by phase; phases that were not needed are not there."""

    key: str = ""
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    graphs: int = 0
    executables: int = 0
    compiled: bool = False
    weights_prepared: bool = False

    @property
    def was_cached(self) -> bool:
        return not self.compiled and not self.weights_prepared

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


@dataclass
class Prepared:
    """The outcome: an artifact, and weights either as a file in the store or, where none can be kept, in an arena."""

    artifact: Mef
    artifact_file: Path | None
    weights_file: Path | None
    weights_id: str
    arena: Arena | None
    report: Report

    @property
    def limits(self) -> Limits:
        return Limits.from_json(self.compiled().facts["limits"])

    def compiled(self) -> CompiledModels:
        return CompiledModels(self.artifact)


def _silent(phase: str, item: str, done: int, total: int) -> None:
    pass


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
        text: TextFacts | None = None,
        progress: Progress = _silent,
        dump: Dump | None = None,
        keep_weights: bool = False,
    ) -> None:
        """settings: every section whose classified fields join the key; keep_weights: fill an arena as well when
        weights have to be prepared, so that a start that goes on to run need not read them back."""
        self.store, self.model, self.batch, self.target = store, model, batch, target
        self.use_subgraphs, self.settings = use_subgraphs, settings
        self.text, self.progress, self.dump = text or TextFacts(), progress, dump or Dump()
        self.keep_weights = keep_weights
        self.report = Report()
        self.checkpoint = checkpoint

    @property
    def max_length(self) -> int | None:
        """The context as asked for or as config.json says, known before compiling; None where it says nothing."""
        trained = self.checkpoint.config.get("max_position_embeddings")
        return self.model.max_length or (trained if isinstance(trained, int) else None)

    def run(self) -> Prepared:
        """Finds or makes both; raises ModelError or WeightError for a checkpoint that cannot be used, and ConfigError
        on a miss under the cache policy `require`."""
        with self.report.timed("lookup"):
            found = self._from_binding()
        if found is None:
            found = self._from_config()
        if self.dump.enabled and not self.report.compiled:
            dump_stored_stages(found.artifact, self.dump)
        return found

    # --- the warm path ---

    def _from_binding(self) -> Prepared | None:
        binding = self.store.lookup_binding(self._binding_digest)
        if binding is None or binding.changed_files():
            return None
        weights = self.store.prepared_path(binding.prepared)
        if weights is None:
            return None
        artifact = self._lookup(Key(binding.key, binding.factors))
        if artifact is None:
            return None
        self.report.key, self.report.reason = binding.key, "bound"
        return Prepared(artifact, self.store.artifact_path(artifact), weights, binding.prepared, None, self.report)

    @property
    def _binding_digest(self) -> str:
        return binding_digest(self.checkpoint.identity(), self._common_factors())

    def _common_factors(self) -> dict[str, Any]:
        """What decides an artifact besides the model: known without parsing its config or importing models/."""
        return {
            "settings": compile_factors(*self.settings),
            "target": self.target.spec(),
            "toolchain": toolchain(self.target.platform),
            "sources": source_digest([_PACKAGE / "compiler", _PACKAGE / "models"]),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        }

    def _lookup(self, key: Key) -> Mef | None:
        """The stored artifact with every section's hash compared; a damaged one is set aside and counts as a miss."""
        found = self.store.lookup(key)
        if found is None:
            return None
        try:
            for section in found.sections():
                found.read(section)
            CompiledModels(found).check_host()
        except CacheError as error:
            self.store.quarantine(key, error)
            return None
        return found

    # --- the way through the architecture's config ---

    def _from_config(self) -> Prepared:
        from ..models import table

        architecture = table.find(self.checkpoint.architecture)
        config = table.load_config(architecture, self.checkpoint.config)
        weights = config.weights()
        self.checkpoint.check(weights)
        limits = self._limits(config)
        factors = {
            "architecture": architecture.name,
            "config": asdict(config),  # type: ignore[call-overload]
            "limits": limits.to_json(),
            **self._common_factors(),
        }
        key = make_key(factors)
        self.report.key = key.digest
        artifact = self._artifact(key, config, limits, weights)
        path, identity, arena = self._weights(weights)
        if path is not None:
            self._bind(key, artifact, identity, limits)
        return Prepared(artifact, self.store.artifact_path(artifact), path, identity, arena, self.report)

    def _limits(self, config: Config) -> Limits:
        wanted = self.model.max_length or config.max_position
        if wanted > config.max_position:
            raise ConfigError(
                f"--max-length {wanted} is more than the {config.max_position} tokens that the model was made for",
                f"Give at most {config.max_position}.",
            )
        return choose_limits(
            max_length=wanted,
            max_batch=self.batch.max_batch_size,
            page_tokens=self.batch.kv_cache_page_size,
            max_step_tokens=self.batch.max_batch_input_tokens,
            page_bytes=sum(group.page_bytes for group in config.cache_groups(self.batch.kv_cache_page_size)),
            total_tokens=self.batch.max_batch_total_tokens,
        )

    def _artifact(self, key: Key, config: Config, limits: Limits, weights: WeightTable) -> Mef:
        found = self._lookup(key)
        if found is not None:
            self.report.reason = "same shape"
            return found
        with self.store.lease(key, on_wait=lambda wait: self.progress("wait", wait.holder, 0, 0)) as lease:
            if lease.found is not None:
                self.report.reason = "made by another process"
                return lease.found
            data = self._compile(config, limits, weights)
            seconds = self.report.seconds["compile"]
            kept = self.store.publish(key, data, command=" ".join(sys.argv[1:]), seconds=seconds)
            return kept or Mef.from_bytes(data)

    def _compile(self, config: Config, limits: Limits, weights: WeightTable) -> bytes:
        with self.report.timed("import"):
            from ..compiler.artifact import Options, compile_module
            from ..models.build import build_text_pipeline

        self.report.reason, self.report.compiled = "compiled", True
        with self.report.timed("compile"):
            module = build_text_pipeline(self.checkpoint.architecture, config, limits)
            facts = {
                "limits": limits.to_json(),
                "vocab_size": config.vocab_size,
                "cache_groups": [asdict(group) for group in config.cache_groups(limits.page_tokens)],
            }
            options = Options(self.use_subgraphs, facts, weights.to_json(), self.dump, self.progress)
            buffer = io.BytesIO()
            summary = compile_module(module, self.target, mef.MefWriter(buffer), options)
        self.report.graphs, self.report.executables = summary.graphs, summary.executables
        xla.release_memory()
        return buffer.getvalue()

    def _weights(self, table: WeightTable) -> tuple[Path | None, str, Arena | None]:
        known = self._prepared_before()
        if known is not None:
            return known[0], known[1], None
        self.report.weights_prepared = True
        arena = Arena(prepared.layout_of(table)) if self.keep_weights or not self.store.writable else None
        threads = len(os.sched_getaffinity(0))

        def on_progress(done: int, total: int) -> None:
            self.progress("prepare weights", "", done, total)

        with self.report.timed("prepare weights"):
            if self.store.writable:
                try:
                    with self.store.temporary(".weights") as path:
                        identity = prepared.prepare(
                            table, self.checkpoint, path, threads=threads, arena=arena, on_progress=on_progress
                        )
                        kept = self.store.publish_prepared(path, identity)
                    if kept is not None:
                        return kept, identity, arena
                except OSError as error:
                    logger.warning("prepared weights cannot be kept: %s; going on without", error)
            arena = arena or Arena(prepared.layout_of(table))
            prepared.prepare_into(table, self.checkpoint, arena, threads=threads, on_progress=on_progress)
            return None, "", arena

    def _prepared_before(self) -> tuple[Path, str] | None:
        """Prepared weights of this very checkpoint, made under other settings."""
        wanted = checkpoint_identity(self.checkpoint.identity())
        for binding in self.store.bindings():
            if binding.checkpoint == wanted and (path := self.store.prepared_path(binding.prepared)):
                return path, binding.prepared
        return None

    def _bind(self, key: Key, artifact: Mef, prepared_id: str, limits: Limits) -> None:
        try:
            binding = Binding(
                digest=self._binding_digest,
                key=key.digest,
                factors=key.factors,
                checkpoint=checkpoint_identity(self.checkpoint.identity()),
                mef=artifact.id,
                prepared=prepared_id,
                files=tuple(BoundFile.of(path) for path in self.text.files),
                stop_token_ids=tuple(self.text.stop_token_ids),
                generation=self.text.generation,
                max_length=limits.max_length,
                architecture=self.checkpoint.architecture,
                created=time.time(),
                versions=toolchain(self.target.platform),
            )
        except (CacheError, OSError) as error:
            logger.warning("the checkpoint cannot be bound to its artifact: %s", error)
            return
        self.store.publish_binding(binding)
