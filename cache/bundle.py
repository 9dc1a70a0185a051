"""Bundles: artifacts of one or several targets in one file, for hosts that no network reaches.

A tar archive: manifest.json as in an exported folder, then its artifacts. An import believes nothing of it: names are
not used as paths, sizes are those of the manifest, and every artifact is checked in full before it is kept.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from .. import CacheError, ConfigError
from .catalog import Entry
from .exported import MANIFEST_NAME, ExportedArtifact, ExportManifest, describe
from .key import make_key
from .mef import Mef
from .record import MAX_RECORD_BYTES
from .store import Store
from .trust import Trust

_PIECE_BYTES = 1 << 20


def write_bundle(path: Path, store: Store, entries: Sequence[Entry]) -> list[ExportedArtifact]:
    """Writes entries with their signatures into one file. Raises: ConfigError where that cannot be; CacheError."""
    opened = [(entry, Mef.open(store.blob_path(entry.record.mef))) for entry in entries]
    rows = [describe(entry.key, mef, store.signed(entry.record.key, mef.id)) for entry, mef in opened]
    part = path.with_name(path.name + ".part")
    try:
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:
            _add(archive, MANIFEST_NAME, msgspec.json.encode(ExportManifest(artifacts=tuple(rows))))
            for row, (_, mef) in zip(rows, opened, strict=True):
                mef.check()
                _add(archive, row.file, mef.content())
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "Name another file.") from error
    finally:
        part.unlink(missing_ok=True)
    return rows


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o600
    archive.addfile(member, io.BytesIO(content))


def read_bundle(path: Path, store: Store, trust: Trust) -> Iterator[ExportedArtifact]:
    """Keeps a bundle's artifacts in the store one by one, and yields what was kept.

    Raises: ConfigError for a file that is no bundle, and for a damaged, unsigned (where that matters) or missing
    artifact; those before it have been kept.
    """
    with _opened(path) as archive:
        wanted = {row.file: row for row in _manifest(archive, path).artifacts}
        while (member := archive.next()) is not None:
            row = wanted.pop(member.name, None)
            if row is None:
                raise ConfigError(f"{path} holds {member.name!r}, which its manifest does not name", "Export it again.")
            if not member.isfile() or member.size != row.bytes:
                raise ConfigError(f"{path} is damaged at {row.file}", "Export it again.")
            _keep(archive, member, row, store, trust, path)
            yield row
        if wanted:
            raise ConfigError(f"{path} lacks {', '.join(sorted(wanted))}", "It was cut short; export it again.")


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except OSError as error:
        hint = "Name a file that `max cache export` wrote."
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}", hint) from error
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path} is no bundle: {error}", "Name a file that `max cache export` wrote.") from error


def _manifest(archive: tarfile.TarFile, path: Path) -> ExportManifest:
    first = archive.next()
    if first is None or first.name != MANIFEST_NAME or not first.isfile() or first.size > MAX_RECORD_BYTES:
        raise ConfigError(f"{path} does not begin with a manifest", "Name a file that `max cache export` wrote.")
    try:
        return msgspec.json.decode(_file(archive, first, path).read(), type=ExportManifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{path} has a damaged manifest: {error}", "Export it again.") from error


def _file(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> IO[bytes]:
    found = archive.extractfile(member)
    if found is None:
        raise ConfigError(f"{path} is damaged at {member.name}", "Export it again.")
    return found


def _keep(
    archive: tarfile.TarFile, member: tarfile.TarInfo, row: ExportedArtifact, store: Store, trust: Trust, path: Path
) -> None:
    key = make_key(row.factors)
    if key.digest != row.key:
        raise ConfigError(f"{path}: the factors of {row.file} do not give its key", "Export it again.")
    if trust.required and not trust.signers(row.key, row.mef, row.signatures):
        raise ConfigError(
            f"{path}: {row.file} bears no signature of a key in {trust.keys_file}", "Sign it where it was made."
        )

    try:
        with store.temporary(".mef") as target:
            content = _file(archive, member, path)
            with open(target, "xb") as file:
                while piece := content.read(_PIECE_BYTES):
                    file.write(piece)
            store.adopt(key, row.mef, target, row.signatures, command=f"imported from {path.name}")
    except CacheError as error:
        raise ConfigError(f"{path}: {row.file}: {error.message}", "Export it again.") from error
