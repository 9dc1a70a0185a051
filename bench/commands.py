"""Times whole commands as a user meets them: `python -m max.bench.commands [--model DIR]`, one JSON line for each.

Every figure is of a process of its own, from start to exit. "cold" starts with an empty cache, once; "warm" repeats
with the cache that cold has filled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from .. import MaxError, __version__

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class CommandsConfig:
    """What is measured."""

    model: str | None = None
    prompt: str = "robot:"
    new_tokens: int = 16
    seed: int = 0
    repeats: int = 5


@dataclass(frozen=True)
class Run:
    """One process: seconds on the clock, and the largest resident set in bytes."""

    seconds: float
    peak_bytes: int


def measure(config: CommandsConfig) -> Iterator[dict[str, object]]:
    """Yields a row for each command: median and slowest seconds, largest peak of memory.

    Raises: MaxError when a command fails, with the last line that it wrote.
    """
    model = ["--model", config.model] if config.model else []
    generate = ["generate", *model, "--prompt", config.prompt, "--seed", str(config.seed), "--ignore-eos"]
    generate += ["--max-new-tokens", str(config.new_tokens)]
    with tempfile.TemporaryDirectory(prefix="max-bench-") as cache:
        environ = {**os.environ, "MODULAR_CACHE_DIR": cache}
        for name, arguments, repeats in (
            ("help", ["--help"], config.repeats),
            ("generate help", ["generate", "--help"], config.repeats),
            ("generate cold", generate, 1),
            ("generate warm", generate, config.repeats),
            ("warm-cache warm", ["warm-cache", *model], config.repeats),
        ):
            runs = [run(arguments, environ) for _ in range(repeats)]
            seconds = [each.seconds for each in runs]
            yield {
                "name": name,
                "runs": repeats,
                "median_s": round(statistics.median(seconds), 3),
                "slowest_s": round(max(seconds), 3),
                "peak_mb": round(max(each.peak_bytes for each in runs) / 1e6),
            }


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> Run:
    """Runs `max` with these arguments; raises MaxError when it fails."""
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "max", *arguments],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            raise MaxError(
                f"max {' '.join(arguments)} ended with {process.returncode}, saying: {said[-1]}",
                "Run it by hand with --log-level debug.",
            )
    return Run(seconds, usage.ru_maxrss * 1024)


def surroundings() -> dict[str, object]:
    """What the figures depend on besides the code: commit, machine and versions."""
    commit = subprocess.run(
        ["git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip() or f"release {__version__}",
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def main(argv: list[str] | None = None) -> None:
    """The command line; argparse reports a wrong one."""
    default = CommandsConfig()
    parser = argparse.ArgumentParser(prog="python -m max.bench.commands", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="checkpoint to use instead of the built-in model")
    parser.add_argument("--prompt", default=default.prompt, help="text to answer (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="default: %(default)s")
    config = CommandsConfig(**vars(parser.parse_args(argv)))
    print(json.dumps({"config": asdict(config), **surroundings()}), flush=True)
    try:
        for row in measure(config):
            print(json.dumps(row), flush=True)
    except MaxError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")


if __name__ == "__main__":
    main()
