"""`max warm-cache`: fills the cache for a model, so that its next start compiles nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from .options import as_yaml, config_options, resolve
from .sections import PIPELINE_SECTIONS, WarmCacheConfig

_SECTIONS = (*PIPELINE_SECTIONS, WarmCacheConfig)


@click.command()
@config_options(*_SECTIONS)
def command(config_file: Path | None, print_config: bool, **given: Any) -> None:
    """Compile a model ahead of time, prepare its weights, and keep both.

    Equal settings find the same artifact in every command. Checks on the way that the checkpoint is complete.

    \b
    max warm-cache --model ./llama
    max warm-cache --model ./llama --max-length 4096 --cache-dir ./cache
    max warm-cache --model ./llama --target cuda:sm_90 --target hip:gfx942
    """
    settings = resolve(_SECTIONS, given, config_file, os.environ, command="warm-cache")
    if print_config:
        click.echo(as_yaml(settings), nl=False)
        return
    from .warming import warm

    warm(settings)
