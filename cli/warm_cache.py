"""`max warm-cache`: fills the cache for a model, so that its next start compiles nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from ..cache.config import CacheConfig
from ..cache.fields import Section, setting
from ..compiler.config import CompileConfig
from ..compiler.target import Target
from ..runtime.checkpoint import Checkpoint
from ..runtime.config import ModelConfig
from ..runtime.preparation import Prepared
from ..serve.text_side import TextSide
from .model_command import PIPELINE_SECTIONS, make_preparation, model_folder
from .options import as_yaml, config_options, resolve
from .progress import ProgressBar
from .resolution import Settings


class WarmCacheConfig(Section):
    """What is compiled for, and the form of the output."""

    target: str | None = setting(None, compiles=False)
    """Platform and architecture to compile for, as in cpu:native [default: this host's --devices]."""

    json_output: bool = setting(False, compiles=False, flag="--json")
    """Print the result as one JSON object."""


_SECTIONS = (*PIPELINE_SECTIONS, WarmCacheConfig)


@click.command()
@config_options(*_SECTIONS)
def command(config_file: Path | None, print_config: bool, **given: Any) -> None:
    """Compile a model ahead of time, prepare its weights, and keep both.

    Equal settings find the same artifact in every command. Checks on the way that the checkpoint is complete.

    \b
    max warm-cache --model ./llama
    max warm-cache --model ./llama --max-length 4096 --cache-dir ./cache
    """
    settings = resolve(_SECTIONS, given, config_file, os.environ, command="warm-cache")
    if print_config:
        click.echo(as_yaml(settings), nl=False)
        return
    config = settings.of(WarmCacheConfig)
    target = Target.parse(config.target) if config.target else settings.of(CompileConfig).target()
    folder = model_folder(settings.of(ModelConfig))
    with ProgressBar() as progress:
        checkpoint = Checkpoint.open(folder)
        text = TextSide.load(folder)
        preparation = make_preparation(settings, checkpoint, text, progress, target=target, keep_weights=False)
        prepared = preparation.run()
    if config.json_output:
        click.echo(json.dumps(_result(prepared, folder, target, settings)))
        return
    for line in _lines(prepared, folder, target, settings):
        click.echo(line)


def _result(prepared: Prepared, folder: Path, target: Target, settings: Settings) -> dict[str, Any]:
    report = prepared.report
    return {
        "model": str(folder),
        "target": target.name,
        "cached": report.was_cached,
        "reason": report.reason,
        "key": report.key,
        "graphs": report.graphs,
        "executables": report.executables,
        "seconds": report.seconds,
        "artifact": prepared.artifact.id,
        "artifact_bytes": prepared.artifact.size,
        "artifact_path": _path(prepared.artifact_file),
        "weights": prepared.weights_id,
        "weights_bytes": prepared.weights_file.stat().st_size if prepared.weights_file else 0,
        "weights_path": _path(prepared.weights_file),
        "cache_dir": str(settings.of(CacheConfig).folder),
    }


def _lines(prepared: Prepared, folder: Path, target: Target, settings: Settings) -> list[str]:
    """The result as a person reads it."""
    result, report = _result(prepared, folder, target, settings), prepared.report
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report.seconds.items())
    made = "all was there already" if report.was_cached else f"made now ({report.reason})"
    counts = f", {report.graphs} graphs in {report.executables} executables" if report.compiled else ""
    lines = [
        f"{folder.name or folder} for {target.name}: {made}{counts}",
        f"  seconds   {phases}",
        f"  artifact  {result['artifact']}  {result['artifact_bytes'] / 1e6:,.1f} MB  {result['artifact_path']}",
        f"  weights   {result['weights']}  {result['weights_bytes'] / 1e6:,.1f} MB  {result['weights_path']}",
    ]
    if prepared.weights_file is None or prepared.artifact_file is None:
        lines.append(f"  not kept: the cache in {result['cache_dir']} cannot be written")
    return lines


def _path(path: Path | None) -> str:
    return "not kept" if path is None else str(path)
