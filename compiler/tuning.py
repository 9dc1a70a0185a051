"""Measurements of kernels: made on a device of this host, kept in a file, used by compilations anywhere.

XLA without a device chooses kernels by a model of their cost. With one it times them, and `record` has it do so for
the products of an artifact. Files are AutotuneResults in protobuf's text form, as --autotune-results takes them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .. import CompileError, ConfigError
from ..cache import mef
from ..cache.scratch import Scratch
from .compile_messages import Job
from .compile_process import compiling
from .finish import sources_of
from .targets import Target
from .targets.attached import attached

Progress = Callable[[str, str, int, int], None]
"""Called with the phase, the executable just measured, and how many of how many are done."""

_VERSION = re.compile(r"^version: *\d+ *$", re.MULTILINE)


def require_device(target: Target) -> None:
    """Raises ConfigError unless this host has such a GPU, on which kernels can be measured."""
    if target.platform not in ("cuda", "hip"):
        raise ConfigError(
            f"--record-autotune-results is for GPUs, and {target.name} is none", "Leave it out for this target."
        )
    if target.arch not in attached(target.platform):
        raise ConfigError(
            f"this host has no {target.name} to measure kernels on",
            "Record on a host with such a device, and bring the file along: --autotune-results FILE.",
        )


def record(artifact: mef.Mef, target: Target, file: Path, progress: Progress) -> None:
    """Compiles an artifact's executables with the device at hand, one by one, and writes what was fastest to `file`.

    Raises CompileError where XLA has measured nothing, ConfigError where the file cannot be written.
    """
    sources = sources_of(artifact)
    parts: list[str] = []
    with compiling(target, 1, on_device=True) as process, Scratch("compile") as scratch:
        for index, (name, source) in enumerate(sources.items(), 1):
            part = scratch.path / f"{index}.txt"
            # The text form is what XLA writes where the name says so.
            process.submit(Job(name, source, {"xla_gpu_dump_autotune_results_to": str(part)}))
            process.answer()
            parts += [part.read_text()] if part.exists() else []
            progress("measure", name, index, len(sources))
    merged = merge_results(parts)
    if not _VERSION.sub("", merged).strip():
        raise CompileError(
            f"XLA measured no kernels for {target.name}",
            "There is nothing to tune in these graphs; leave the option out.",
        )
    _write(file, merged)


def merge_results(parts: Iterable[str]) -> str:
    """Several files of measurements as one: the version that they share, and then the results of each.

    Raises CompileError for files of different versions.
    """
    texts = list(parts)
    versions = {match[0].strip() for text in texts for match in _VERSION.finditer(text)}
    if len(versions) > 1:
        raise CompileError(
            f"measurements of different forms do not go together: {', '.join(sorted(versions))}",
            "Record all of them with one release.",
        )
    results = dict.fromkeys(_VERSION.sub("", text).strip() for text in texts)
    return "\n".join([*versions, *(text for text in results if text)]) + "\n"


def _write(file: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.replace(file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(
            f"{file} cannot be written: {error}", "Give --record-autotune-results another path."
        ) from error
