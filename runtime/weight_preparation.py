"""Prepared weights of a checkpoint: found in the store, or made, and kept where they can be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .. import CacheError
from ..cache.binding import checkpoint_identity
from ..cache.store import Store
from ..compiler.weights import WeightTable
from . import prepared
from .arena import Arena
from .checkpoint import Checkpoint
from .preparation_report import PreparedWeights, Report

Progress = Callable[[str, str, int, int], None]
"""Called with the phase, the item just finished, and how many of how many are done."""


def find_or_prepare(
    table: WeightTable, checkpoint: Checkpoint, store: Store, report: Report, progress: Progress, *, keep: bool
) -> PreparedWeights:
    """Weights in the form that the graphs take.

    keep: fill an arena as well when they have to be made, so that a start that goes on to run need not read them back
    """
    known = _made_before(checkpoint, store)
    if known is not None:
        return known
    report.weights_prepared = True
    arena = Arena(prepared.layout_of(table)) if keep or not store.writable else None
    threads = len(os.sched_getaffinity(0))

    def on_progress(done: int, total: int) -> None:
        progress("prepare weights", "", done, total)

    with report.timed("prepare weights"):
        if store.writable:
            try:
                with store.temporary(".weights") as path:
                    identity = prepared.prepare(
                        table, checkpoint, path, threads=threads, arena=arena, on_progress=on_progress
                    )
                    kept = store.publish_prepared(path, identity)
                if kept is not None:
                    return PreparedWeights(kept, identity, arena)
            except (OSError, CacheError) as error:
                store.not_kept("file of prepared weights", error)
        arena = arena or Arena(prepared.layout_of(table))
        prepared.prepare_into(table, checkpoint, arena, threads=threads, on_progress=on_progress)
        return PreparedWeights(None, "", arena)


def _made_before(checkpoint: Checkpoint, store: Store) -> PreparedWeights | None:
    """Weights of this very checkpoint, prepared under other settings."""
    wanted = checkpoint_identity(checkpoint.identity())
    for binding in store.bindings():
        path: Path | None = store.prepared_path(binding.prepared) if binding.checkpoint == wanted else None
        if path is not None:
            return PreparedWeights(path, binding.prepared, None)
    return None
