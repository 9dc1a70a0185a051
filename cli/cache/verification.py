"""`max cache verify`: every hash compared, and with --run every artifact tried in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from click.exceptions import Exit

from ... import CacheError
from ...cache.binding import Binding
from ...cache.catalog import Entry, find_all
from ...cache.config import CacheConfig
from ...cache.folder import read_small
from ...cache.mef import Mef
from ...cache.record import ActionRecord, decode
from ...cache.signing import SignatureRecord
from ...cache.store import Store
from .options import cache_command, print_json
from .table import print_table


@dataclass(frozen=True)
class Checked:
    """One file of the cache; `trouble` is "" for a sound one, and `untried` says why --run could not try it here."""

    kind: str
    name: str
    trouble: str
    untried: str = ""


@cache_command("require_signed", "trusted_keys")
@click.argument("names", nargs=-1, metavar="[ENTRY...]")
@click.option("--run", "tries", is_flag=True, help="Also load each artifact in a child process and run its probes.")
def command(config: CacheConfig, store: Store, as_json: bool, names: tuple[str, ...], tries: bool) -> None:
    """Compare every hash of entries, bindings and prepared weights; of all of them unless some are named.

    Ends with exit code 1 when something is damaged; the next start that meets it sets it aside and makes it again.
    What was compiled for other machines is not tried.

    \b
    max cache verify
    max cache verify 3f2a --run
    max cache verify --require-signed
    """
    found = find_all(store, names)
    checked = [*_damaged_records(store), *(each for entry in found for each in _check(store, entry, tries))]
    checked += _check_prepared(store, found)
    _show(checked, as_json)
    if any(each.trouble for each in checked):
        raise Exit(1)


def _show(checked: list[Checked], as_json: bool) -> None:
    bad = [each for each in checked if each.trouble]
    untried = [each for each in checked if each.untried]
    if as_json:
        print_json(
            {
                "checked": len(checked),
                "damaged": [{"kind": each.kind, "name": each.name, "trouble": each.trouble} for each in bad],
                "untried": [{"name": each.name, "reason": each.untried} for each in untried],
            }
        )
        return
    if bad:
        print_table(("kind", "name", "trouble"), [[each.kind, each.name[:16], each.trouble] for each in bad])
    if untried:
        print_table(("not tried here", "reason"), [[each.name[:16], each.untried] for each in untried])
    click.echo(f"{len(checked)} checked, {len(bad)} damaged" + (f", {len(untried)} not tried" if untried else ""))


def _damaged_records(store: Store) -> Iterator[Checked]:
    """Every record that cannot be read, since listings pass over those."""
    for folder, record_type in (("index", ActionRecord), ("bindings", Binding), ("signatures", SignatureRecord)):
        for path in _files(store.root / folder):
            try:
                if record_type is Binding:
                    Binding.decoded(read_small(path), path)
                else:
                    decode(read_small(path), record_type, path)
                trouble = ""
            except CacheError as error:
                trouble = error.message
            except OSError as error:
                trouble = error.strerror or str(error)
            yield Checked(folder, path.stem, trouble)


def _check(store: Store, entry: Entry, tries: bool) -> Iterator[Checked]:
    record, trouble = entry.record, ""
    path = store.blob_path(record.mef)
    try:
        artifact = Mef.open(path)
        if artifact.id != record.mef:
            raise CacheError(f"{path} is the artifact {artifact.id}")
        artifact.check()
    except CacheError as error:
        trouble = error.message
    yield Checked("artifact", record.mef, trouble)
    if store.trust.required and not store.trust.signers(record.key, record.mef, store.signatures(record.key)):
        yield Checked("signature", record.key, f"no signature of a key in {store.trust.keys_file}")
    if tries and not trouble:
        yield _tried(record.mef, path)


def _tried(mef: str, path: Path) -> Checked:
    from ...runtime.trial import not_for_here, try_artifact

    if reason := not_for_here(Mef.open(path)):
        return Checked("trial", mef, "", reason)
    return Checked("trial", mef, try_artifact(path))


def _check_prepared(store: Store, found: list[Entry]) -> Iterator[Checked]:
    from ...runtime.prepared_format import check_file

    for identity in sorted({binding.prepared for entry in found for binding in entry.bindings}):
        path = store.prepared_file(identity)
        try:
            check_file(path, identity)
            trouble = ""
        except CacheError as error:
            trouble = error.message
        yield Checked("weights", identity, trouble)


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False))
    except OSError:
        return []
