"""IR dumps for compiler engineers: every stage of every graph as a readable file, with an index.

Asked for with MODULAR_DEBUG=ir-output-dir=DIR, with `ir-output-dir` under [max-debug] in $MODULAR_HOME/modular.cfg, or
with `InferenceSession.debug.ir_output_dir`.
"""

from __future__ import annotations

import configparser
import functools
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .. import ConfigError
from ..cache.scratch import Scratch

logger = logging.getLogger(__name__)

_KNOWN_OPTIONS = frozenset({"ir-output-dir"})


def dump_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where dumps are wanted, or None. The environment wins over the file; unknown options are warned about."""
    parts = [part.partition("=") for part in environ.get("MODULAR_DEBUG", "").split(",") if part]
    options = {name: value for name, _, value in parts}
    for name in sorted(options.keys() - _KNOWN_OPTIONS):
        _warn_of(name)
    folder = options.get("ir-output-dir") or _configured(environ.get("MODULAR_HOME"))
    return Path(folder) if folder else None


@functools.cache
def _warn_of(option: str) -> None:
    """Once in a process, however often it asks."""
    logger.warning("MODULAR_DEBUG: unknown option %r; ignoring", option)


def _configured(home: str | None) -> str:
    """What modular.cfg says, or the empty string."""
    if not home:
        return ""
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(Path(home) / "modular.cfg", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        logger.warning("cannot read %s/modular.cfg: %s", home, error)
    return config.get("max-debug", "ir-output-dir", fallback="")


@dataclass
class Dump:
    """Writes stages to a folder, or nothing at all when `folder` is None."""

    folder: Path | None = None
    _entries: list[dict[str, object]] = field(default_factory=list)

    @property
    def enabled(self) -> bool:
        return self.folder is not None

    def write(self, name: str, stage: str, text: str, seconds: float = 0.0) -> None:
        """Writes `<name>.<stage>`, for example `step_t8_r8.2.stablehlo.mlir`; raises ConfigError where it cannot."""
        if self.folder is None:
            return
        file = f"{name}.{stage}"
        self._write(file, text)
        size = len(text.encode())
        self._entries.append({"file": file, "graph": name, "stage": stage, "bytes": size, "seconds": round(seconds, 4)})

    def _write(self, file: str, text: str) -> None:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be written to {self.folder}: {error.strerror}", "Give another ir-output-dir."
            ) from None

    def finish(self) -> None:
        """Writes index.json: the files of this dump, and those of an earlier one that are still there."""
        if self.folder is None:
            return
        written = {str(entry["file"]): entry for entry in self._entries}
        with suppress(OSError, ValueError, TypeError, KeyError):
            earlier = {entry["file"]: entry for entry in json.loads((self.folder / "index.json").read_text())}
            written = {name: entry for name, entry in earlier.items() if (self.folder / name).is_file()} | written
        self._write("index.json", json.dumps([written[name] for name in sorted(written)], indent=1) + "\n")
        total = sum(int(str(entry["bytes"])) for entry in self._entries)
        logger.info("wrote IR files=%d bytes=%d folder=%s", len(self._entries), total, self.folder)

    @contextmanager
    def code(self, name: str) -> Iterator[str | None]:
        """Gives a folder for XLA's own dump of one executable, and keeps stages 4 and 6 of it."""
        if self.folder is None:
            yield None
            return
        with Scratch("xla-dump") as scratch:
            folder = scratch.path
            yield str(folder)
            before = sorted(folder.glob("*.before_optimizations.txt"))
            self.write(name, "4.hlo", before[0].read_text() if before else "")
            self.write(name, "6.ll", _llvm_ir(folder))
            for stage, text in (("6.asm", _assembly(folder)), ("6.ptx", _ptx(folder))):
                if text:
                    self.write(name, stage, text)


def _llvm_ir(folder: Path) -> str:
    """The optimized LLVM IR of every kernel, one after another."""
    kernels = sorted(folder.glob("*.ir-with-opt.ll"))
    texts = [f"; kernel {_kernel_name(path)}\n{path.read_text()}" for path in kernels]
    return "\n".join(texts) or "; no kernel was generated: this executable only calls library routines\n"


def _ptx(folder: Path) -> str:
    """The assembly for NVIDIA's assembler, where the target is such a GPU."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.ptx")))


def _assembly(folder: Path) -> str:
    """The disassembled kernels, where a disassembler is installed."""
    tool = shutil.which("objdump") or shutil.which("llvm-objdump")
    objects = sorted(folder.glob("*.o"))
    if tool is None or not objects:
        return ""
    command = [tool, "-d", "--no-show-raw-insn", *map(str, objects)]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return listing.replace(f"{folder}/", "")


def _kernel_name(path: Path) -> str:
    return re.sub(r"^module_\d+\.[^.]*\.", "", path.name).removesuffix(".ir-with-opt.ll")
