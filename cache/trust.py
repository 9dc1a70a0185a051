"""Whom the cache trusts: an artifact is code that will be run, so it lies in a private place or bears a signature."""

import errno
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from . import signing

if TYPE_CHECKING:
    from .config import CacheConfig


@dataclass(frozen=True)
class Trust:
    """Which artifacts may be used: all of a private place, or only signed ones."""

    keys_file: Path
    required: bool = False
    """Whether also what lies in a private place needs a signature."""

    is_named: bool = False
    """Whether the file was asked for: then it has to be there."""

    @classmethod
    def of(cls, config: "CacheConfig") -> "Trust":
        named = config.trusted_keys
        keys_file = named.expanduser().absolute() if named else signing.config_folder() / "trusted-keys"
        return cls(keys_file, config.require_signed, named is not None)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Signer -> comment. Raises: ConfigError for a file that cannot be used."""
        return signing.read_trusted(self.keys_file, may_be_absent=not self.is_named)

    def check_named(self) -> None:
        """Reads the keys now if their file was asked for, so that a mistake in it is told. Raises: ConfigError."""
        if self.is_named:
            _ = self.keys

    def signers(self, key: str, mef: str, record: signing.SignatureRecord | None) -> list[str]:
        """The trusted signers of an artifact under a key. Raises: ConfigError as `keys` does."""
        return signing.valid_signers(record, key, mef, self.keys) if record is not None and self.keys else []


def distrust_of(folder: Path) -> str:
    """Returns why what lies in a folder may be somebody else's, "" for a private one. Raises: OSError."""
    state = os.stat(folder)
    if not stat.S_ISDIR(state.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if is_foreign(state):
        return f"{folder} belongs to another user (uid {state.st_uid})"
    if state.st_mode & stat.S_IWOTH:
        return f"everybody may write to {folder}"
    return ""


def is_foreign(state: os.stat_result) -> bool:
    """Whether a file is another user's. Root may do anything anyway: what it made, as in an image, is no less safe."""
    return state.st_uid not in (os.geteuid(), 0)


def is_foreign_file(path: Path) -> bool:
    """Whether a file in a folder that a group shares was put there by another user; False where it cannot be told."""
    try:
        return is_foreign(os.lstat(path))
    except OSError:
        return False
