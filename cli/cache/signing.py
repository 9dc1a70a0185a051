"""`max cache key` and `max cache sign`: who vouches for artifacts."""

from __future__ import annotations

from pathlib import Path

import click

from ...cache import signing
from ...cache.catalog import find_all
from ...cache.config import CacheConfig
from ...cache.store import Store
from ..commands import CommandEntry
from ..lazy_group import LazyGroup
from .options import cache_command, print_json

key = LazyGroup(
    table={
        "new": CommandEntry(".signing", "Make a private key, and print its public one.", attribute="new"),
        "show": CommandEntry(".signing", "Print the public key of a private one.", attribute="show"),
    },
    package=__package__ or "",
    name="key",
    help="""Make and show the keys that sign artifacts.

    \b
    max cache key new
    max cache key show >> trusted-keys
    """,
)

_key_file = click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help="Private key, a PEM file [default: $XDG_CONFIG_HOME/max/signing-key or ~/.config/max/signing-key].",
)


def _key_path(key_file: Path | None) -> Path:
    return key_file if key_file is not None else signing.config_folder() / "signing-key"


@click.command()
@_key_file
def new(key_file: Path | None) -> None:
    """Make a private key, and print its public one: a line for the file of trusted keys.

    \b
    max cache key new
    max cache key new --key-file ./ci-key
    """
    path = _key_path(key_file)
    line = signing.new_key(path)
    click.echo(f"wrote {path}; who trusts it adds this line to the trusted keys:", err=True)
    click.echo(line)


@click.command()
@_key_file
def show(key_file: Path | None) -> None:
    """Print the public key of a private one.

    \b
    max cache key show >> trusted-keys
    """
    path = _key_path(key_file)
    click.echo(signing.public_line(signing.read_key(path), path.stem))


@cache_command(writes=True)
@click.argument("names", nargs=-1, required=False, metavar="[ENTRY...]")
@click.option("--all", "everything", is_flag=True, help="Sign every entry.")
@_key_file
def sign(
    config: CacheConfig, store: Store, as_json: bool, names: tuple[str, ...], everything: bool, key_file: Path | None
) -> None:
    """Vouch for artifacts: who trusts the key may use them from anywhere.

    The signature covers the artifact and the key that it is stored under. It travels with exports and pushes.

    \b
    max cache sign 3f2a
    max cache sign --all --key-file ./ci-key
    """
    if bool(names) == everything:
        raise click.UsageError("name the entries to sign, or give --all")
    private = signing.read_key(_key_path(key_file))
    found = find_all(store, names)
    for entry in found:
        store.add_signatures(signing.sign(private, entry.record.key, entry.record.mef))
    if as_json:
        signer = signing.signer_of(private)
        rows = [{"key": e.record.key, "artifact": e.record.mef, "signer": signer} for e in found]
        print_json(rows)
    else:
        for entry in found:
            click.echo(f"signed {entry.record.key}")
