"""`max cache prune`, `pin` and `unpin`: what goes and what stays."""

from __future__ import annotations

from pathlib import Path

import click

from ... import ConfigError
from ...cache.bounds import Bounds
from ...cache.catalog import find
from ...cache.config import CacheConfig
from ...cache.eviction import Evicted, evict
from ...cache.store import Store
from .options import cache_command, print_json
from .table import print_table, size


@cache_command("max_cache_size", "max_cache_age", "min_free_space", writes=True)
@click.option("--all", "everything", is_flag=True, help="Remove all that is not pinned.")
@click.option("--quarantine", is_flag=True, help="Also remove what was set aside as damaged, at once.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def prune(config: CacheConfig, store: Store, as_json: bool, everything: bool, quarantine: bool, dry_run: bool) -> None:
    """Remove what is old, too much, damaged or left over.

    Brings the cache within its bounds now, as each start that adds to it does. What is pinned stays.

    \b
    max cache prune --max-cache-size 10GB
    max cache prune --max-cache-age 30 --dry-run
    max cache prune --all
    """
    _check_writable(store)
    bounds = Bounds(0) if everything else Bounds.of(config)
    gone = evict(store.root, bounds, dry_run=dry_run)
    if quarantine:
        gone = Evicted((*gone.paths, *_clear_quarantine(store, dry_run)))
    if as_json:
        rows = [{"path": str(path), "bytes": count} for path, count in gone.paths]
        print_json({"dry_run": dry_run, "bytes": gone.bytes, "files": rows})
        return
    if gone.paths:
        print_table(
            ("bytes", "file"), [[size(n), str(path.relative_to(store.root))] for path, n in gone.paths], ("bytes",)
        )
    click.echo(f"{'would remove' if dry_run else 'removed'} {len(gone.paths)} files, {size(gone.bytes)}")


def _clear_quarantine(store: Store, dry_run: bool) -> list[tuple[Path, int]]:
    found = [(path, path.stat().st_size) for path in sorted((store.root / "quarantine").iterdir()) if path.is_file()]
    if not dry_run:
        for path, _ in found:
            path.unlink(missing_ok=True)
    return found


@cache_command(writes=True)
@click.argument("names", nargs=-1, required=True, metavar="ENTRY...")
def pin(config: CacheConfig, store: Store, as_json: bool, names: tuple[str, ...]) -> None:
    """Keep entries, and the prepared weights bound to them, whatever the bounds of the cache.

    \b
    max cache pin 3f2a
    """
    _pin(store, names, as_json, True)


@cache_command(writes=True)
@click.argument("names", nargs=-1, required=True, metavar="ENTRY...")
def unpin(config: CacheConfig, store: Store, as_json: bool, names: tuple[str, ...]) -> None:
    """Let pinned entries go when their time comes.

    \b
    max cache unpin 3f2a
    """
    _pin(store, names, as_json, False)


def _pin(store: Store, names: tuple[str, ...], as_json: bool, pinned: bool) -> None:
    _check_writable(store)
    found = [find(store, name) for name in names]
    for entry in found:
        store.pin(entry.key, pinned)
    if as_json:
        print_json([{"key": entry.record.key, "pinned": pinned} for entry in found])
    else:
        for entry in found:
            click.echo(f"{'pinned' if pinned else 'unpinned'} {entry.record.key}")


def _check_writable(store: Store) -> None:
    if not store.writable:
        raise ConfigError(f"the cache in {store.root} cannot be changed", "`max cache doctor` says why.")
