"""Prepared weights of a checkpoint: found in the store, or made, and kept where they can be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import CacheError, ConfigError
from ..cache.binding import checkpoint_identity
from ..cache.store import Store
from ..compiler import Target, native, threads
from ..compiler.limits import PageFormat
from ..compiler.panels import Packing, packs
from ..compiler.weights import Element, WeightTable
from . import prepared
from .arena import Arena
from .checkpoint import Checkpoint
from .preparation_report import PreparedWeights, Report

if TYPE_CHECKING:
    from ..models.table import Config

logger = logging.getLogger(__name__)

Progress = Callable[[str, str, int, int], None]
"""Called with the phase, the item just finished, and how many of how many are done."""


def choose_packing(wanted: Packing | None, checkpoint: Checkpoint, target: Target) -> Packing:
    """The encoding in which matrices are packed for the CPU kernels: as asked for, else that of most in the checkpoint.

    Empty for targets without these kernels, and where they were not built, which means plain XLA; that is said once.
    Raises ConfigError when another encoding than float32 was asked for then.
    """
    if target.lowering != "cpu":
        return ""
    if native.library() is not None:
        return wanted or checkpoint.encoding
    if wanted not in (None, "float32"):
        raise ConfigError(f"{wanted} on cpu needs the kernels, and there are none", native.how_to_get())
    logger.warning("there are no CPU kernels: going on with plain XLA, which is slower; %s", native.how_to_get())
    return ""


def choose_element(wanted: Packing | None, checkpoint: Checkpoint, target: Target) -> Element:
    """What weights are made of that are not packed: on devices bfloat16, unless float32 is asked for, or stored.

    Raises ConfigError when another encoding was asked for on a device.
    """
    if target.lowering == "cpu":
        return "float32"
    if wanted not in (None, "float32", "bfloat16"):
        raise ConfigError(
            f"{wanted} is not there for {target.name} yet: its graphs compute in bfloat16 or float32",
            "Leave --quantization-encoding out, or give bfloat16 or float32.",
        )
    return "float32" if (wanted or checkpoint.encoding) == "float32" else "bfloat16"


def weights_of(
    config: Config, packing: Packing, wanted: Packing | None, checkpoint: Checkpoint, target: Target
) -> WeightTable:
    """The weights of a pipeline: packed matrices keep the encodings of the checkpoint unless one was asked for.

    Says what becomes of matrices that lose by it, or that cannot have the encoding.
    """
    own = checkpoint.encodings
    table = config.weights(packing, None if wanted else own)
    if not packing:
        table = table.made_of(choose_element(wanted, checkpoint, target))
        return table.by_output().split(config.sharding(target.devices)) if target.lowering == "gpu" else table
    again = {own[name] for name in own if wanted and own[name] not in ("float32", "bfloat16", wanted)}
    if again:
        logger.warning("quantized weights are converted: from=%s to=%s", ",".join(sorted(again)), wanted)
    narrow = [weight for weight in table.weights if weight.packed and not packs(packing, weight.shape[0])]
    if narrow:
        logger.warning(
            "%d matrices are packed as %s: their widths are no multiples of the 256 that a block of %s spans",
            len(narrow),
            narrow[0].packed,
            packing,
        )
    return table


def choose_page_format(wanted: str | None, packing: Packing, element: Element) -> PageFormat:
    """What keys and values are kept in: as asked for, else no wider than the weights.

    Beside weights of bfloat16 such pages move logits by a tenth more; at long contexts they are most of what is read.
    """
    if wanted is not None:
        return cast("PageFormat", wanted)  # BatchConfig has refused what is not there
    return "float32" if (packing or element) == "float32" else "bfloat16"


def find_or_prepare(
    table: WeightTable,
    checkpoint: Checkpoint,
    store: Store,
    report: Report,
    progress: Progress,
    *,
    made_by: dict[str, Any],
    keep: bool,
) -> PreparedWeights:
    """Weights in the form that the graphs take.

    made_by: the factors of a key that decide how weights are laid out; weights made under others are not taken
    keep: fill an arena as well when they have to be made, so that a start that goes on to run need not read them back
    """
    known = _made_before(checkpoint, store, made_by)
    if known is not None:
        return known
    report.weights_prepared = True
    arena = Arena(prepared.layout_of(table)) if keep or not store.writable else None
    num_threads = threads.count()

    def on_progress(done: int, total: int) -> None:
        progress("prepare weights", "", done, total)

    with report.timed("prepare weights"):
        if store.writable:
            try:
                with store.temporary(".weights") as path:
                    identity = prepared.prepare(
                        table, checkpoint, path, threads=num_threads, arena=arena, on_progress=on_progress
                    )
                    kept = store.publish_prepared(path, identity)
                if kept is not None:
                    return PreparedWeights(kept, identity, arena)
            except (OSError, CacheError) as error:
                store.not_kept("file of prepared weights", error)
        arena = arena or Arena(prepared.layout_of(table))
        prepared.prepare_into(table, checkpoint, arena, threads=num_threads, on_progress=on_progress)
        return PreparedWeights(None, "", arena)


def _made_before(checkpoint: Checkpoint, store: Store, made_by: dict[str, Any]) -> PreparedWeights | None:
    """Weights of this very checkpoint, prepared under other settings."""
    wanted = checkpoint_identity(checkpoint.identity())
    for binding in store.bindings():
        same = binding.checkpoint == wanted and made_by.items() <= binding.factors.items()
        path: Path | None = store.prepared_path(binding.prepared) if same else None
        if path is not None:
            return PreparedWeights(path, binding.prepared, None)
    return None
