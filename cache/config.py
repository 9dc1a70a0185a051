"""Where artifacts are kept and come from, how many bytes they may take, whom to trust, and what a miss means."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ByteSize

from .. import ConfigError
from .fields import Section, setting

CachePolicy = Literal["on", "off", "readonly", "redo", "require"]


def _positive(size: ByteSize) -> ByteSize:
    if size <= 0:
        raise ValueError("must be more than 0 bytes, such as 20GB")
    return size


REMOTE_SCHEMES = ("s3", "gs", "az", "azure", "abfs", "abfss", "http", "https", "file")


def _remote(url: str | None) -> str | None:
    scheme, found, place = (url or "").partition("://")
    if url is not None and not (found and place and scheme in REMOTE_SCHEMES):
        raise ValueError(
            f"must begin with one of {', '.join(f'{name}://' for name in REMOTE_SCHEMES)} and name a place"
        )
    return url


class CacheConfig(Section):
    """The store of compiled artifacts and prepared weights."""

    cache_dir: Path | None = setting(None, compiles=False, environment="MODULAR_CACHE_DIR")
    """Folder of compiled artifacts and prepared weights [default: $XDG_CACHE_HOME/max or ~/.cache/max]."""

    cache_policy: CachePolicy = setting("on", compiles=False)
    """on: use and fill the cache; off: neither; readonly: use only; redo: rebuild and replace; require: fail on a miss,
    naming what differs."""

    max_cache_size: Annotated[ByteSize, AfterValidator(_positive)] = setting(ByteSize(50 * 10**9), compiles=False)
    """Bytes the cache may take, prepared weights included, such as 20GB; the least recently used go first."""

    max_cache_age: float | None = setting(None, compiles=False, gt=0)
    """Days after which what was not used goes, pinned artifacts excepted [default: no limit]."""

    min_free_space: ByteSize = setting(ByteSize(0), compiles=False)
    """Bytes to leave free on the cache's disk, such as 10GB: the least recently used goes when there are fewer."""

    cache_remote: Annotated[str | None, AfterValidator(_remote)] = setting(None, compiles=False)
    """Place to look for artifacts that the cache lacks: s3://, gs://, az://, http(s):// or file://; only read,
    `max cache push` fills it."""

    require_signed: bool = setting(False, compiles=False)
    """Use no stored artifact but those signed with a trusted key."""

    trusted_keys: Path | None = setting(None, compiles=False)
    """File of public keys, one in a line, as `max cache key new` prints them
    [default: $XDG_CONFIG_HOME/max/trusted-keys or ~/.config/max/trusted-keys]."""

    sign_with: Path | None = setting(None, compiles=False)
    """Private key, a PEM file of `max cache key new`, that signs every artifact that is made, exported or pushed."""

    export_mefs: Path | None = setting(None, compiles=False)
    """Folder to write the artifact to as well, with a manifest, for --precompiled-mefs."""

    precompiled_mefs: tuple[Path, ...] = setting((), compiles=False)
    """Folder that --export-mefs has filled: the artifact comes from there or the command fails, nothing is compiled;
    may be given more than once."""

    @property
    def folder(self) -> Path:
        """The folder in force: `cache_dir`, else $MODULAR_CACHE_DIR, else $XDG_CACHE_HOME/max, else ~/.cache/max.

        Raises: ConfigError where `~` stands for no folder, as for a user without a home.
        """
        named = self._named()
        try:
            return named.expanduser().absolute()
        except RuntimeError as error:
            hint = "Name a folder with --cache-dir."
            raise ConfigError(f"the cache folder {named} cannot be found: no home folder is known", hint) from error

    def _named(self) -> Path:
        if self.cache_dir is not None:
            return self.cache_dir
        if named := os.environ.get("MODULAR_CACHE_DIR"):
            return Path(named)
        if base := os.environ.get("XDG_CACHE_HOME"):
            return Path(base) / "max"
        return Path("~/.cache/max")
