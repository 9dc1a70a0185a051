"""Signatures: who vouches for an artifact, by ed25519 over its id and the key that it is stored under.

The key is signed too: otherwise whoever can write to a folder could pass one signed artifact off as another. Private
keys are PEM files (PKCS 8) as openssl reads them; trusted public keys stand in a file, one in a line, with a comment.
"""

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from .. import CacheError, ConfigError
from .record import Digest, Sha256

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_ALGORITHM = "ed25519"
_DOMAIN = b"max artifact v1"


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One signature; both are base64: of the raw public key (32 bytes) and of the signature (64 bytes)."""

    signer: str
    value: str


class SignatureRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All signatures of what one key names."""

    format: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    key: Digest
    mef: Sha256
    signatures: tuple[Signature, ...]

    def joined(self, other: "SignatureRecord | None") -> "SignatureRecord":
        """This record with the other's signatures of the same artifact; a signer's newer signature wins."""
        if other is None or (other.key, other.mef) != (self.key, self.mef):
            return self
        found = {each.signer: each for each in (*other.signatures, *self.signatures)}
        return msgspec.structs.replace(self, signatures=tuple(found[name] for name in sorted(found)))


def statement(key: str, mef: str) -> bytes:
    """The bytes that are signed: three lines."""
    return b"\n".join([_DOMAIN, key.encode(), mef.encode(), b""])


def config_folder() -> Path:
    """Where keys are by default: $XDG_CONFIG_HOME/max or ~/.config/max."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path("~/.config").expanduser()) / "max"


def new_key(path: Path) -> str:
    """Makes a private key, readable for its owner only, and returns the line of its public key.

    Raises: ConfigError where there is a file already, or none can be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(f"there is a file {path} already", "Name another one; a key is never replaced.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "Name another file.") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return public_line(key, path.stem)


def read_key(path: Path) -> "Ed25519PrivateKey":
    """Reads a private key. Raises: ConfigError for anything else, and for a file that others may read."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"others may read the private key {path}", f"Run: chmod 600 {path}")
        key = load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        raise ConfigError(f"there is no private key {path}", "Make one with `max cache key new`.") from None
    except OSError as error:
        raise ConfigError(f"the private key {path} cannot be read: {error.strerror}", "Name another one.") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no private key: {error}", "Make one with `max cache key new`.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is no {_ALGORITHM} key", "Make one with `max cache key new`.")
    return key


def public_line(key: "Ed25519PrivateKey", comment: str = "") -> str:
    """The public key as a line of a file of trusted keys."""
    return " ".join(part for part in (_ALGORITHM, signer_of(key), comment) if part)


def signer_of(key: "Ed25519PrivateKey") -> str:
    """The public key in base64: a signer's name."""
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def sign(private: "Ed25519PrivateKey", key: str, mef: str) -> SignatureRecord:
    """Vouches that the artifact `mef` is what `key` names."""
    value = base64.b64encode(private.sign(statement(key, mef))).decode()
    return SignatureRecord(key=key, mef=mef, signatures=(Signature(signer_of(private), value),))


def read_trusted(path: Path, *, may_be_absent: bool = False) -> dict[str, str]:
    """Returns signer -> comment of a file of trusted keys; empty when it is absent and may be.

    Raises: ConfigError for a line that is no key, and where others may write to the file.
    """
    try:
        state = path.stat()
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        if may_be_absent and isinstance(error, FileNotFoundError):
            return {}
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the trusted keys {path} cannot be read: {why}", "Name another --trusted-keys.") from error
    if state.st_mode & 0o022 or state.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"others may write to the trusted keys {path}", f"Own it, and run: chmod go-w {path}")
    trusted = {}
    for number, line in enumerate(lines, 1):
        algorithm, _, rest = line.strip().partition(" ")
        signer, _, comment = rest.strip().partition(" ")
        if algorithm.startswith("#") or not algorithm:
            continue
        if algorithm != _ALGORITHM or len(_decoded(signer)) != 32:
            hint = f"A line is `{_ALGORITHM} <32 bytes in base64> <comment>`, as `max cache key new` prints it."
            raise ConfigError(f"{path} line {number} is no public key", hint)
        trusted[signer] = comment.strip()
    return trusted


def valid_signers(record: SignatureRecord, key: str, mef: str, trusted: dict[str, str]) -> list[str]:
    """Returns the trusted signers whose signature of this artifact under this key holds."""
    if (record.key, record.mef) != (key, mef):
        return []
    return [each.signer for each in record.signatures if each.signer in trusted and _holds(each, key, mef)]


def _holds(signature: Signature, key: str, mef: str) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        public = Ed25519PublicKey.from_public_bytes(_decoded(signature.signer))
        public.verify(_decoded(signature.value), statement(key, mef))
    except (InvalidSignature, ValueError):
        return False
    return True


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def unsigned(what: object, keys_file: Path) -> CacheError:
    """Why an artifact is passed over."""
    return CacheError(
        f"{what} has no signature of a key in {keys_file}",
        "sign it with `max cache sign` where it was made, and add the public key there",
    )
