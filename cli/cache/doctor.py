"""`max cache doctor`: what is wrong with the cache, or may become so."""

from __future__ import annotations

import click
from click.exceptions import Exit

from ...cache.config import CacheConfig
from ...cache.health import Finding, examine
from ...cache.store import Store
from .options import cache_command, print_json

_MARKS = {"ok": "ok  ", "warning": "warn", "trouble": "BAD "}


@cache_command("max_cache_size", "min_free_space", "trusted_keys")
def command(config: CacheConfig, store: Store, as_json: bool) -> None:
    """Check folder, permissions, locks, file system, orphans and versions.

    Changes nothing but a file of its own, which it removes again. Ends with exit code 1 when something is wrong.

    \b
    max cache doctor
    max cache doctor --cache-dir /mnt/shared/max --json
    """
    findings = examine(config)
    if as_json:
        print_json([{"check": each.check, "state": each.state, "detail": each.detail} for each in findings])
    else:
        for each in findings:
            click.echo(_line(each))
    if any(each.state == "trouble" for each in findings):
        raise Exit(1)


def _line(finding: Finding) -> str:
    return f"{_MARKS[finding.state]} {finding.check:<12} {finding.detail}"
