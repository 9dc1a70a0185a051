"""From the settings of a pipeline to its preparation: what the commands and the engine worker share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ..cache.config import CacheConfig
from ..cache.fields import Section
from ..cache.store import Store
from ..compiler import Target, threads
from ..compiler.config import CompileConfig
from ..compiler.dump import Dump
from ..compiler.xla_targets import DeviceUse
from ..runtime.checkpoint import Checkpoint
from ..runtime.config import BatchConfig, ModelConfig
from ..runtime.preparation import Preparation, Progress, TextFacts, unchecked
from .text_side import TextSide

_GENERATION = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


class PipelineConfig(BaseModel):
    """The sections that decide which artifact is used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    compiling: CompileConfig
    batch: BatchConfig
    cache: CacheConfig

    @property
    def device_use(self) -> DeviceUse:
        """The devices to run on, and how much of their memory to take."""
        return DeviceUse(self.compiling.device_ids, self.batch.device_memory_utilization)

    @property
    def sections(self) -> list[Section]:
        return [self.model, self.compiling, self.batch, self.cache]


def preparation_of(
    config: PipelineConfig,
    checkpoint: Checkpoint,
    text: Callable[[], TextSide],
    progress: Progress,
    *,
    target: Target | None = None,
    dump: Dump | None = None,
    keep_weights: bool,
    portable: bool = False,
    autotune: Path | None = None,
    check: Callable[[int, int], None] = unchecked,
) -> Preparation:
    """A preparation of this checkpoint, for `target` or else the device that the settings name.

    Computes with the threads that the settings name from now on.

    target: one to compile for exactly; the device is also served by an artifact that needs less than it has
    text: called when a binding is written, which a warm start does not do
    autotune: measurements to compile with instead of those that the settings name
    """
    threads.use(config.compiling.num_threads)
    return Preparation(
        checkpoint,
        Store.open(config.cache),
        config.model,
        config.batch,
        target or config.compiling.target(),
        use_subgraphs=config.compiling.use_subgraphs,
        settings=config.sections,
        text=lambda: _facts(text()),
        progress=progress,
        dump=dump,
        keep_weights=keep_weights,
        exact=target is not None,
        portable=portable,
        autotune=autotune or config.compiling.autotune_results,
        use_vendor_blas=config.compiling.use_vendor_blas,
        check=check,
    )


def _facts(text: TextSide) -> TextFacts:
    defaults = text.defaults
    generation = {name: value for name in _GENERATION if (value := getattr(defaults, name)) is not None}
    return TextFacts(text.files, sorted(defaults.stop_token_ids), generation)
