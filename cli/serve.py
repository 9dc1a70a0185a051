"""`max serve`: an OpenAI-compatible server of one model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ..runtime.config import QueueConfig
from ..serve.config import ServerConfig
from .options import as_yaml, config_options, resolve
from .sections import PIPELINE_SECTIONS

_SECTIONS = (*PIPELINE_SECTIONS, QueueConfig, ServerConfig)


@click.command()
@config_options(*_SECTIONS)
def command(config_file: Path | None, print_config: bool, **given: Any) -> None:
    """Serve a model over HTTP, as the OpenAI API does.

    Without --model the built-in dictionary model answers. The port is open at once; /health answers while the model
    loads, /readyz says when it has. A page at / shows the server's state and a place to chat.

    \b
    max serve
    max serve --model ./llama --port 8080 --served-model-name llama
    """
    settings = resolve(_SECTIONS, given, config_file, os.environ, command="serve")
    if print_config:
        click.echo(as_yaml(settings), nl=False)
        return
    from .serving import serve

    serve(settings)
