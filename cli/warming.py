"""One run of `max warm-cache`: prepares artifact and weights for every target, and says what was done."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from .. import ConfigError
from ..cache.config import CacheConfig
from ..compiler import Target
from ..compiler.compat import is_lowered
from ..compiler.config import CompileConfig
from ..runtime.checkpoint import Checkpoint
from ..runtime.config import ModelConfig
from ..runtime.preparation_report import Prepared
from ..serve.text_side import TextSide
from .model_command import make_preparation, model_folder
from .progress import ProgressBar
from .resolution import Settings
from .sections import WarmCacheConfig


def warm(settings: Settings) -> None:
    """Fills the cache under these settings and prints the result on stdout."""
    config, compiling = settings.of(WarmCacheConfig), settings.of(CompileConfig)
    targets = list(dict.fromkeys(_target(name, compiling) for name in config.target)) or [compiling.target()]
    _check_recording(config, compiling, targets)
    model = settings.of(ModelConfig)
    folder = model_folder(model)
    cache = settings.of(CacheConfig)
    checkpoint = Checkpoint.open(folder, model.weight_path, model.rope_order, cache)
    text = TextSide.load(folder, weight_path=model.weight_path, cache=cache)
    for target in targets:
        with ProgressBar() as progress:
            prepare = partial(
                make_preparation,
                settings,
                checkpoint,
                text,
                progress,
                target=target,
                keep_weights=False,
                portable=config.portable,
            )
            prepared = prepare().run()
            if (file := config.record_autotune_results) is not None:
                from ..compiler.tuning import record

                record(prepared.artifact, target, file, progress)
                prepared = prepare(autotune=file).run()
        if config.json_output:
            click.echo(json.dumps(_result(prepared, folder, target, settings)))
            continue
        for line in _lines(prepared, folder, target, settings):
            click.echo(line)


def _target(name: str, compiling: CompileConfig) -> Target:
    """A target of --target, for as many devices as --devices names; raises ConfigError."""
    target, devices = Target.parse(name), max(1, len(compiling.device_ids))
    return target if target.devices > 1 else target.over(devices)


def _check_recording(config: WarmCacheConfig, compiling: CompileConfig, targets: list[Target]) -> None:
    """Raises ConfigError for measurements that are to be recorded and cannot be, before anything is read."""
    if config.record_autotune_results is None:
        return
    if compiling.autotune_results is not None or len(targets) > 1:
        raise ConfigError(
            "--record-autotune-results goes with one target, and not with --autotune-results",
            "Record for one device at a time; the artifact is compiled with what was measured.",
        )
    from ..compiler.tuning import require_device

    require_device(targets[0])


def _result(prepared: Prepared, folder: Path, target: Target, settings: Settings) -> dict[str, Any]:
    report = prepared.report
    return {
        "model": str(folder),
        "target": target.name,
        "form": "lowered" if is_lowered(prepared.artifact) else "native",
        "cached": report.was_cached,
        "reason": report.reason,
        "key": report.key,
        "graphs": report.graphs,
        "executables": report.executables,
        "seconds": report.seconds,
        "artifact": prepared.artifact.id,
        "artifact_bytes": prepared.artifact.size,
        "artifact_path": _path(prepared.artifact_file),
        "weights": prepared.weights.id,
        "weights_bytes": prepared.weights.file.stat().st_size if prepared.weights.file else 0,
        "weights_path": _path(prepared.weights.file),
        "cache_dir": str(settings.of(CacheConfig).folder),
    }


def _lines(prepared: Prepared, folder: Path, target: Target, settings: Settings) -> list[str]:
    """The result as a person reads it."""
    result, report = _result(prepared, folder, target, settings), prepared.report
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report.seconds.items())
    made = "all was there already" if report.was_cached else f"made now ({report.reason})"
    if result["form"] == "lowered":
        made += ", to be compiled at the first start there"
    counts = f", {report.graphs} graphs in {report.executables} executables" if report.compiled else ""
    lines = [
        f"{folder.name or folder} for {target.name}: {made}{counts}",
        f"  seconds   {phases}",
    ]
    for kind in ("artifact", "weights"):
        size, path = result[f"{kind}_bytes"] / 1e6, result[f"{kind}_path"]
        lines.append(f"  {kind:<10}" + (f"{result[kind]}  {size:,.1f} MB  {path}" if path else "not kept"))
    if prepared.weights.file is None or prepared.artifact_file is None:
        policy, folder = settings.of(CacheConfig).cache_policy, result["cache_dir"]
        why = f"--cache-policy is {policy}" if policy in ("off", "readonly") else f"{folder} cannot be filled"
        lines.append(f"  not everything is kept: {why}")
    return lines


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)
