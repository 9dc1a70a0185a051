"""What a start with some settings would find in the cache, and on a miss which factor is to blame."""

from __future__ import annotations

from typing import Any

import click

from ...cache.catalog import nearest
from ...cache.config import CacheConfig
from ...cache.key import Difference
from ...cache.store import Store
from ...runtime.checkpoint import Checkpoint
from ...runtime.config import ModelConfig
from ...runtime.ladder import runs_here
from ...runtime.preparation import Preparation
from ...runtime.wanted import Wanted
from ...serve.text_side import TextSide
from ..model_command import make_preparation, model_folder
from ..progress import ProgressBar
from ..resolution import Settings
from .comparison import differences_json, print_differences
from .options import print_json


def explain_start(settings: Settings, as_json: bool) -> None:
    """Prints whether artifact and weights would be found; looks only, under whatever cache policy."""
    config = settings.of(CacheConfig).model_copy(update={"cache_policy": "readonly", "cache_remote": None})
    settings = Settings(config if isinstance(each, CacheConfig) else each for each in settings)
    model = settings.of(ModelConfig)
    folder = model_folder(model)
    checkpoint = Checkpoint.open(folder, model.weight_path, model.rope_order, config)
    text = TextSide.load(folder, weight_path=model.weight_path, cache=config)
    preparation = make_preparation(settings, checkpoint, text, ProgressBar(), keep_weights=False)
    wanted = preparation.wanted()
    result, differing = _explained(preparation, wanted)
    result = {"model": str(folder), "cache_dir": str(config.folder), **result}
    if as_json:
        rows = differences_json(differing, wanted.key.digest, result["nearest"]) if differing else None
        print_json({**result, "differences": rows["differences"] if rows else []})
        return
    _show(result)
    if differing:
        print_differences(differing, "wanted", f"{result['nearest'][:12]} has")


def _explained(preparation: Preparation, wanted: Wanted) -> tuple[dict[str, Any], list[Difference]]:
    store: Store = preparation.store
    found = store.find(wanted.key, runs_here(wanted.key.factors))
    binding = preparation.binding()
    near = nearest(store, wanted.key) if found is None else None
    missed = next(iter(store.counters.misses), "")
    return {
        "key": wanted.key.digest,
        "hit": found is not None,
        "kind": found.kind if found else "miss",
        "artifact": found.mef.id if found else None,
        "reason": "" if found else missed,
        "bound": binding is not None,
        "weights_prepared": binding is not None and store.prepared_path(binding.prepared) is not None,
        "nearest": near[0].key if near else None,
    }, near[1] if near else []


def _show(result: dict[str, Any]) -> None:
    click.echo(f"key       {result['key']}")
    if result["hit"]:
        how = "hit" if result["kind"] == "exact" else "hit, compiled for fewer instruction sets than this host has"
        click.echo(f"artifact  {how}: {result['artifact']}")
    else:
        click.echo(f"artifact  miss ({result['reason']}): a start would compile it")
    weights = "prepared" if result["weights_prepared"] else "not prepared for these settings: a start would do that"
    click.echo(f"weights   {weights}")
    if not result["hit"]:
        what = "the nearest entry differs in" if result["nearest"] else "there is no entry to compare with"
        click.echo(what)
