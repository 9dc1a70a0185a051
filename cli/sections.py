"""The settings of each command. Imports no command's work, so that `max CMD --help` stays fast."""

from __future__ import annotations

from pathlib import Path

from ..cache.config import CacheConfig
from ..cache.fields import Section, setting
from ..compiler.config import CompileConfig
from ..runtime.config import BatchConfig, ModelConfig, SchedulingConfig

PIPELINE_SECTIONS: tuple[type[Section], ...] = (ModelConfig, CompileConfig, BatchConfig, CacheConfig, SchedulingConfig)
"""The settings of a pipeline, which decide on its artifact and how it is run; the same for every command, so that the
command line of one is good for another."""


class GenerateConfig(Section):
    """The prompt and the form of the output."""

    prompt: str | None = setting(None, compiles=False)
    """Text to answer or to continue."""

    chat_template: str | None = setting(None, compiles=False)
    """Chat template to use instead of the model's: Jinja text, or the path of a file with it."""

    apply_chat_template: bool | None = setting(None, compiles=False)
    """Send the prompt as a user's message; without, as plain text [default: where the model has a template]."""

    num_warmups: int = setting(0, compiles=False, ge=0)
    """Generate this often before the run that is shown and timed."""

    json_output: bool = setting(False, compiles=False, flag="--json")
    """Print one JSON object with text and statistics instead of streaming the text."""


class WarmCacheConfig(Section):
    """What is compiled for, and the form of the output."""

    target: tuple[str, ...] = setting((), compiles=False)
    """Platform and architecture to compile for, as in cuda:sm_90, which need not be here; `max list --targets` has all.
    May be given several times [default: this host's --devices]."""

    portable: bool = setting(False, compiles=False)
    """Keep portable StableHLO instead of code: needs no compiler for the target; the first start there compiles it."""

    record_autotune_results: Path | None = setting(None, compiles=False)
    """Have this host's GPU time kernels for the model, write what was fastest to this file, and compile with it; for
    --autotune-results anywhere."""

    json_output: bool = setting(False, compiles=False, flag="--json")
    """Print the result as one JSON object."""
