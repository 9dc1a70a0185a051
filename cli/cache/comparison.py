"""`max cache diff` and `max cache explain`: which factor makes two artifacts different ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from ...cache.catalog import find
from ...cache.config import CacheConfig
from ...cache.key import Absent, Difference
from ...cache.key import explain as differences
from ...cache.store import Store
from ..options import config_options, resolve
from ..sections import PIPELINE_SECTIONS
from .options import cache_command, print_json
from .table import print_table


@cache_command()
@click.argument("first")
@click.argument("second")
def diff(config: CacheConfig, store: Store, as_json: bool, first: str, second: str) -> None:
    """Show the factors in which two entries differ.

    \b
    max cache diff 3f2a 90bc
    """
    one, other = find(store, first), find(store, second)
    found = differences(one.record.factors, other.record.factors)
    if as_json:
        print_json(differences_json(found, one.record.key, other.record.key))
    elif not found:
        click.echo("no factor differs")
    else:
        print_differences(found, one.record.key[:12], other.record.key[:12])


def print_differences(found: list[Difference], first: str, second: str) -> None:
    """Shows factors side by side; long values are cut around where they begin to differ."""
    rows = [[each.path, *_side_by_side(each)] for each in found]
    print_table(("factor", first, second), rows)


def _side_by_side(each: Difference, width: int = 60) -> tuple[str, str]:
    """The two values; of lists only the items that the other one lacks."""
    ours, theirs = each.wanted, each.have
    if isinstance(ours, list) and isinstance(theirs, list):
        more, less = [x for x in ours if x not in theirs], [x for x in theirs if x not in ours]
        if more or less:
            return _cut("with " + ", ".join(map(str, more)) if more else "without", width), _cut(
                "with " + ", ".join(map(str, less)) if less else "without", width
            )
    return _cut(_text(ours), width), _cut(_text(theirs), width)


def _text(value: Any) -> str:
    return str(value) if isinstance(value, (str, Absent)) else json.dumps(value)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def differences_json(found: list[Difference], first: str, second: str) -> dict[str, Any]:
    rows = [{"factor": each.path, "first": _plain(each.wanted), "second": _plain(each.have)} for each in found]
    return {"first": first, "second": second, "differences": rows}


def _plain(value: Any) -> Any:
    """A factor as JSON; one that a key lacks is null."""
    return value if isinstance(value, (str, int, float, bool, list, dict)) else None


@click.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@config_options(*PIPELINE_SECTIONS)
def explain(config_file: Path | None, print_config: bool, as_json: bool, model: Path | None, **given: Any) -> None:
    """Say whether a model would be found, and if not, why.

    Takes the options of generate, serve and warm-cache. On a miss it names the factors in which the nearest entry
    differs. Nothing is compiled and nothing is written.

    \b
    max cache explain ./llama
    max cache explain --model ./llama --max-length 4096 --json
    """
    from .explanation import explain_start

    if model is not None and given.get("model_path") is None:
        given["model_path"] = model
    settings = resolve(PIPELINE_SECTIONS, given, config_file, os.environ, command="explain")
    explain_start(settings, as_json)
