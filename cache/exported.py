"""Folders of artifacts with a manifest: written by --export-mefs on one host, used by --precompiled-mefs on another.

manifest.json lists the artifacts with the factors of their keys, so that what does not fit is named; nothing that is
not in it is used. Such a folder is all there is to a start: it has its artifact or the command fails.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from .. import CacheError, ConfigError, MissingArtifactError
from .folder import move_into_place, read_small, unused_name, write_small
from .key import Key, explain
from .mef import MANIFEST, Mef
from .record import Digest, Sha256
from .signing import SignatureRecord
from .trust import Trust, distrust_of

MANIFEST_NAME = "manifest.json"


class ExportedArtifact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One artifact of a folder or a bundle."""

    file: Annotated[str, msgspec.Meta(pattern=r"\A[\w.-]+\Z", max_length=255)]
    name: str
    target: str
    key: Digest
    mef: Sha256
    bytes: int
    factors: dict[str, Any]
    graphs: dict[str, Any]
    """Graph -> names, dtypes and shapes of its inputs and outputs."""
    signatures: SignatureRecord | None = None


class ExportManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What manifest.json holds."""

    format: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    artifacts: tuple[ExportedArtifact, ...] = ()


def describe(key: Key, artifact: Mef, signatures: SignatureRecord | None) -> ExportedArtifact:
    """The manifest's row for an artifact. Raises: CacheError when it cannot be read."""
    manifest = artifact.json(MANIFEST)
    graphs = {name: _signature(graph) for name, graph in manifest.get("graphs", {}).items()}
    name = str(manifest.get("name", "module"))
    return ExportedArtifact(
        file=f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}-{key.digest[:12]}.mef",
        name=name,
        target=str(manifest.get("target", "")),
        key=key.digest,
        mef=artifact.id,
        bytes=artifact.size,
        factors=key.factors,
        graphs=graphs,
        signatures=signatures,
    )


def _signature(graph: dict[str, Any]) -> dict[str, Any]:
    inputs = [row for row in graph.get("arguments", ()) if row.get("role") == "input"]
    return {"inputs": inputs, "outputs": graph.get("outputs", [])}


def export_to(folder: Path, key: Key, artifact: Mef, signatures: SignatureRecord | None) -> Path:
    """Writes an artifact into a folder and names it in the manifest there; the same key's older one is replaced.

    Raises: ConfigError where it cannot be written.
    """
    row = describe(key, artifact, signatures)
    path = folder / row.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = unused_name(folder, ".part")
        try:
            temporary.write_bytes(artifact.content())
            move_into_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with _alone_in(folder):
            kept = [each for each in read_manifest(folder).artifacts if each.key != row.key]
            manifest = ExportManifest(artifacts=(*kept, row))
            write_small(folder / MANIFEST_NAME, msgspec.json.format(msgspec.json.encode(manifest), indent=1), folder)
    except OSError as error:
        raise ConfigError(
            f"the artifact cannot be exported to {folder}: {error.strerror}", "Name another --export-mefs."
        ) from error
    return path


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps others from adding to the manifest meanwhile: what they add would be lost. Without effect where the file
    system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> ExportManifest:
    """The manifest of a folder, empty where there is none yet. Raises: ConfigError for a damaged one."""
    path = folder / MANIFEST_NAME
    try:
        return msgspec.json.decode(read_small(path), type=ExportManifest)
    except FileNotFoundError:
        return ExportManifest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "Check its permissions.") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no manifest of artifacts: {error}", "Export the artifacts again.") from error


@dataclass(frozen=True)
class Precompiled:
    """An artifact of an exported folder, checked in full."""

    mef: Mef
    key: Key
    path: Path


def find_precompiled(
    folders: Sequence[Path],
    key: Key,
    trust: Trust,
    serves: Callable[[dict[str, Any]], bool] | None = None,
    what: str = "these settings",
) -> Precompiled:
    """Returns the artifact of a key, or one that serves as well, from the first folder that has it.

    serves: as for `Store.find`
    what: what the artifact is for, as an error says it
    Raises: MissingArtifactError when none has it, naming what differs from the nearest one; ConfigError when it must
    not be used.
    """
    rows: list[tuple[Path, ExportedArtifact]] = []
    for folder in folders:
        if not (folder / MANIFEST_NAME).is_file():
            hint = "Name a folder that --export-mefs has filled."
            raise MissingArtifactError(f"{folder} holds no artifacts, and so none for {what}", hint)
        rows += [(folder, row) for row in read_manifest(folder).artifacts]
    for folder, row in rows:
        if row.key == key.digest and not explain(key.factors, row.factors):
            return _opened(folder, row, trust)
    for folder, row in rows:
        if serves is not None and serves(row.factors):
            return _opened(folder, row, trust)
    names = ", ".join(map(str, folders))
    if not rows:
        hint = "Export some with --export-mefs."
        raise MissingArtifactError(f"there are no artifacts in {names}, and so none for {what}", hint)
    differing = min((explain(key.factors, row.factors) for _, row in rows), key=len)
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    how = f"differs in {differing[0]}{more}" if differing else "is damaged"
    raise MissingArtifactError(
        f"no artifact in {names} was compiled for {what}; the nearest one {how}",
        f"Export one for {what}, or leave --precompiled-mefs out.",
    )


def _opened(folder: Path, row: ExportedArtifact, trust: Trust) -> Precompiled:
    path = folder / row.file
    try:
        distrust = distrust_of(folder)
        if (distrust or trust.required) and not trust.signers(row.key, row.mef, row.signatures):
            why = distrust or "signatures are required"
            raise ConfigError(
                f"{path} bears no signature of a key in {trust.keys_file}, and {why}", "Sign it where it was made."
            )
        artifact = Mef.open(path)
        if artifact.id != row.mef:
            raise CacheError(f"{path} is the artifact {artifact.id[:12]} and not {row.mef[:12]}")
        artifact.check()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "Check its permissions.") from error
    except CacheError as error:
        raise ConfigError(error.message, f"Export it again to {folder}.") from error
    return Precompiled(artifact, Key(row.key, row.factors), path)
