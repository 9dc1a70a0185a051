"""`max generate`: one prompt, one answer, streamed to stdout; statistics on stderr."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ..runtime.config import FeaturesConfig, SamplingConfig
from .options import as_yaml, config_options, resolve
from .sections import PIPELINE_SECTIONS, GenerateConfig

_SECTIONS = (*PIPELINE_SECTIONS, FeaturesConfig, SamplingConfig, GenerateConfig)


@click.command()
@config_options(*_SECTIONS)
def command(config_file: Path | None, print_config: bool, **given: Any) -> None:
    """Generate text from a model and a prompt, without a server.

    Without --model the built-in dictionary model answers. What has to be compiled is kept in the cache; the next start
    with the same settings compiles nothing.

    \b
    max generate --prompt "robot:"
    max generate --model ./llama --prompt "Explain caches" --max-new-tokens 200 --temperature 0.7 --seed 42
    """
    settings = resolve(_SECTIONS, given, config_file, os.environ, command="generate")
    if print_config:
        click.echo(as_yaml(settings), nl=False)
        return
    from .generation import Generation

    Generation(settings).run()
