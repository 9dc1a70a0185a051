"""What the commands of `max cache` share: --cache-dir, --json, and the settings behind them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import click

from ...cache.config import CacheConfig
from ...cache.store import Store
from ..options import option_of
from ..resolution import resolve

_ALWAYS = ("cache_dir",)


def cache_command(*fields: str, writes: bool = False, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Makes a command that receives `config: CacheConfig`, `store: Store`, `as_json: bool` and its own parameters.

    fields: settings of the cache that have a flag here, besides --cache-dir; the environment sets all of them
    writes: whether the command changes the cache; otherwise a folder that is not there is not made
    """
    names = (*_ALWAYS, *fields)

    def decorate(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def call(as_json: bool, **given: Any) -> None:
            of_cache = {name: given.pop(name) for name in names}
            (config,) = resolve([CacheConfig], of_cache, None, os.environ)
            assert isinstance(config, CacheConfig)
            config = config.model_copy(update={"cache_policy": "on" if writes else "readonly"})
            function(config=config, store=Store.open(config), as_json=as_json, **given)

        for name in reversed(names):
            call = option_of(name, CacheConfig.model_fields[name])(call)
        call = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(call)
        return click.command(**settings)(call)

    return decorate


def print_json(value: Any) -> None:
    """Prints a result for machines."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
