"""What the commands that run or compile a model share: finding it, its settings, and its preparation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ..cache.config import CacheConfig
from ..compiler import Target
from ..compiler.config import CompileConfig
from ..compiler.dump import Dump, dump_folder
from ..runtime.checkpoint import Checkpoint
from ..runtime.config import BatchConfig, ModelConfig
from ..runtime.preparation import Preparation, Progress, unchecked
from ..serve.pipeline import PipelineConfig, preparation_of
from ..serve.text_side import TextSide
from .resolution import Settings

# Not imported from models/builtin: a warm start loads nothing of models/.
_BUILT_IN = Path(__file__).resolve().parent.parent / "models" / "builtin"


def model_folder(model: ModelConfig) -> Path:
    """The folder of the model that was asked for, or of the built-in one, which is said on stderr."""
    if model.model_path is not None:
        return model.model_path
    click.echo("no --model given: using the built-in dictionary model", err=True)
    return _BUILT_IN


def pipeline_of(settings: Settings) -> PipelineConfig:
    """The settings that a pipeline is made from."""
    return PipelineConfig(
        model=settings.of(ModelConfig),
        compiling=settings.of(CompileConfig),
        batch=settings.of(BatchConfig),
        cache=settings.of(CacheConfig),
    )


def make_preparation(
    settings: Settings,
    checkpoint: Checkpoint,
    text: TextSide,
    progress: Progress,
    *,
    target: Target | None = None,
    keep_weights: bool,
    portable: bool = False,
    autotune: Path | None = None,
    check: Callable[[int, int], None] = unchecked,
) -> Preparation:
    """A preparation of this model under these settings, for `target` or else the device that they name.

    autotune: measurements to compile with instead of those that the settings name
    """
    dump = Dump(dump_folder())
    if dump.enabled:
        click.echo(f"writing every stage of the IR to {dump.folder}", err=True)
    pipeline = pipeline_of(settings)
    return preparation_of(
        pipeline,
        checkpoint,
        lambda: text,
        progress,
        target=target,
        dump=dump,
        keep_weights=keep_weights,
        portable=portable,
        autotune=autotune,
        check=check,
    )
