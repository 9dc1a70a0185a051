"""What the commands that run or compile a model share: finding it, its settings, and its preparation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from ..cache.config import CacheConfig
from ..cache.store import Store
from ..compiler.config import CompileConfig
from ..compiler.dump import Dump, dump_folder
from ..compiler.target import Target
from ..runtime.checkpoint import Checkpoint
from ..runtime.config import BatchConfig, ModelConfig
from ..runtime.preparation import Preparation, Progress, TextFacts, unchecked
from ..serve.text_side import TextSide
from .resolution import Settings
from .sections import PIPELINE_SECTIONS

# Not imported from models/builtin: a warm start loads nothing of models/.
_BUILT_IN = Path(__file__).resolve().parent.parent / "models" / "builtin"


def model_folder(model: ModelConfig) -> Path:
    """The folder of the model that was asked for, or of the built-in one, which is said on stderr."""
    if model.model_path is not None:
        return model.model_path
    click.echo("no --model given: using the built-in dictionary model", err=True)
    return _BUILT_IN


def make_preparation(
    settings: Settings,
    checkpoint: Checkpoint,
    text: TextSide,
    progress: Progress,
    *,
    target: Target | None = None,
    keep_weights: bool,
    check: Callable[[int, int], None] = unchecked,
) -> Preparation:
    """A preparation of this model under these settings, for `target` or else the device that they name."""
    config = settings.of(CompileConfig)
    dump = Dump(dump_folder())
    if dump.enabled:
        click.echo(f"writing every stage of the IR to {dump.folder}", err=True)
    return Preparation(
        checkpoint,
        Store.open(settings.of(CacheConfig)),
        settings.of(ModelConfig),
        settings.of(BatchConfig),
        target or config.target(),
        use_subgraphs=config.use_subgraphs,
        settings=[settings.of(section) for section in PIPELINE_SECTIONS],
        text=_facts(text),
        progress=progress,
        dump=dump,
        keep_weights=keep_weights,
        check=check,
    )


def _facts(text: TextSide) -> TextFacts:
    defaults = text.defaults
    names: Sequence[str] = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    generation = {name: value for name in names if (value := getattr(defaults, name)) is not None}
    return TextFacts(text.files, sorted(defaults.stop_token_ids), generation)
