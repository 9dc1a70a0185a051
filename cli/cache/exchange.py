"""`max cache export`, `import`, `push` and `pull`: artifacts on their way to other hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ... import ConfigError
from ...cache.catalog import find_all
from ...cache.config import CacheConfig
from ...cache.exported import ExportedArtifact
from ...cache.store import Store
from .options import cache_command, print_json
from .table import print_table, size


@cache_command("sign_with")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, metavar="[ENTRY...]")
def export(config: CacheConfig, store: Store, as_json: bool, bundle: Path, names: tuple[str, ...]) -> None:
    """Write entries, all of them unless some are named, into one file for another host.

    Artifacts of several targets may go into one bundle. Signatures go with them, prepared weights do not: the other
    host makes them from its checkpoint.

    \b
    max cache export llama.bundle 3f2a 90bc
    max cache export everything.bundle --sign-with ./ci-key
    """
    from ...cache.bundle import write_bundle

    found = find_all(store, names)
    if not found:
        raise ConfigError(f"there is nothing to export in {store.root}", "Fill the cache with `max warm-cache`.")
    _show(write_bundle(bundle, store, found), as_json, f"exported to {bundle}")


@cache_command("require_signed", "trusted_keys", writes=True)
@click.argument("bundle", type=click.Path(path_type=Path))
def import_(config: CacheConfig, store: Store, as_json: bool, bundle: Path) -> None:
    """Keep the artifacts of a bundle, after checking each in full.

    A start here tries each of them once, in a process of its own, before it uses it.

    \b
    max cache import llama.bundle
    max cache import llama.bundle --require-signed --trusted-keys ./ours
    """
    from ...cache.bundle import read_bundle

    _check_writable(store)
    _show(list(read_bundle(bundle, store, store.trust)), as_json, f"imported into {store.root}")


@cache_command("cache_remote", "sign_with")
@click.argument("names", nargs=-1, metavar="[ENTRY...]")
def push(config: CacheConfig, store: Store, as_json: bool, names: tuple[str, ...]) -> None:
    """Write entries, all of them unless some are named, to the remote.

    Credentials are those of the environment: AWS_*, GOOGLE_*, AZURE_*.

    \b
    max cache push 3f2a --cache-remote s3://bucket/max --sign-with ./ci-key
    """
    remote = _remote(config, store)
    pushed = [(entry, remote.push(store, entry)) for entry in find_all(store, names)]
    if as_json:
        print_json([{"key": entry.record.key, "pushed": new} for entry, new in pushed])
    else:
        for entry, new in pushed:
            click.echo(f"{'pushed' if new else 'there already:'} {entry.record.key}")


@cache_command("cache_remote", "require_signed", "trusted_keys", writes=True)
@click.argument("names", nargs=-1, metavar="[KEY...]")
def pull(config: CacheConfig, store: Store, as_json: bool, names: tuple[str, ...]) -> None:
    """Keep artifacts of the remote, all of them unless keys are named in full, after checking each.

    A start with --cache-remote does this by itself with what it lacks.

    \b
    max cache pull --cache-remote s3://bucket/max
    """
    _check_writable(store)
    remote = _remote(config, store)
    rows = [remote.pull(store, name) for name in (names or sorted(remote.keys()))]
    _show(rows, as_json, f"pulled into {store.root}")


def _remote(config: CacheConfig, store: Store) -> Any:
    if config.cache_remote is None:
        raise ConfigError("no remote is named", "Name one with --cache-remote, such as s3://bucket/max.")
    from ...cache.remote import Remote

    return Remote(config.cache_remote, store.trust)


def _check_writable(store: Store) -> None:
    if not store.writable:
        raise ConfigError(f"the cache in {store.root} cannot be changed", "`max cache doctor` says why.")


def _show(rows: list[ExportedArtifact], as_json: bool, what: str) -> None:
    if as_json:
        print_json(
            [
                {
                    "key": row.key,
                    "artifact": row.mef,
                    "target": row.target,
                    "bytes": row.bytes,
                    "signed": bool(row.signatures),
                }
                for row in rows
            ]
        )
        return
    columns = ("key", "name", "target", "size", "signed")
    table = [[row.key[:12], row.name, row.target, size(row.bytes), "signed" if row.signatures else ""] for row in rows]
    print_table(columns, table, right=("size",))
    click.echo(f"{len(rows)} {what}")
