"""`max cache ls` and `max cache stats`: what is there, in full and in sum."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from ...cache.catalog import Entry, entries
from ...cache.config import CacheConfig
from ...cache.folder import SUBFOLDERS
from ...cache.store import Store
from .options import cache_command, print_json
from .table import ago, print_table, size

_KEY_DIGITS = 12


@cache_command()
@click.option("--limit", type=click.IntRange(min=1), metavar="COUNT", help="Only the most recently used.")
def ls(config: CacheConfig, store: Store, as_json: bool, limit: int | None) -> None:
    """List the entries, the most recently used first.

    \b
    max cache ls
    max cache ls --limit 10 --json
    """
    found = entries(store)[:limit]
    if as_json:
        print_json([entry.to_json() for entry in found])
    elif not found:
        click.echo(f"no entries in {store.root}")
    else:
        columns = ("key", "architecture", "target", "encoding", "length", "size", "used", "", "checkpoints")
        print_table(columns, [_row(entry) for entry in found], right=("size", "length"))


def _row(entry: Entry) -> list[str]:
    factors = entry.record.factors
    limits = factors.get("limits")
    length = limits.get("max_length", "") if isinstance(limits, dict) else ""
    marks = ("pinned" if entry.pinned else "", "signed" if entry.signers else "")
    names = [os.path.basename(path) for path in entry.checkpoints]
    return [
        entry.record.key[:_KEY_DIGITS],
        entry.architecture,
        entry.target,
        str(factors.get("packing", "")),
        str(length),
        size(entry.record.bytes),
        ago(entry.used),
        " ".join(filter(None, marks)),
        ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
    ]


@cache_command("max_cache_size")
def stats(config: CacheConfig, store: Store, as_json: bool) -> None:
    """Sum up what the cache holds.

    \b
    max cache stats
    max cache stats --json
    """
    figures = _figures(config, store)
    if as_json:
        print_json(figures)
        return
    rows = [[name, str(each["files"]), size(each["bytes"])] for name, each in figures["folders"].items()]
    click.echo(f"{figures['cache_dir']}: {size(figures['bytes'])} of {size(figures['max_bytes'])}")
    click.echo(
        f"{figures['entries']} entries for {figures['checkpoints']} checkpoints, {figures['pinned']} pinned, "
        f"{figures['signed']} signed; compiled in {figures['seconds']:,.0f} s; "
        f"{size(figures['free_bytes'])} free on the disk"
    )
    print_table(("folder", "files", "bytes"), rows, right=("files", "bytes"))


def _figures(config: CacheConfig, store: Store) -> dict[str, Any]:
    found = entries(store)
    folders = {name: _tree(store.root / name) for name in SUBFOLDERS}
    return {
        "cache_dir": str(store.root),
        "entries": len(found),
        "checkpoints": len({path for entry in found for path in entry.checkpoints}),
        "pinned": sum(entry.pinned for entry in found),
        "signed": sum(bool(entry.signers) for entry in found),
        "seconds": sum(entry.record.seconds for entry in found),
        "bytes": sum(each["bytes"] for each in folders.values()),
        "max_bytes": int(config.max_cache_size),
        "free_bytes": shutil.disk_usage(store.root).free if store.root.exists() else 0,
        "folders": folders,
    }


def _tree(folder: Path) -> dict[str, int]:
    files = total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue  # removed since it was listed
            files += 1
    return {"files": files, "bytes": total}
