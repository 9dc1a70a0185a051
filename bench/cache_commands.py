"""How long `max cache` takes with a thousand entries, and what the trial of an artifact adds to a first start.

`python -m max.bench.cache_commands [--entries 1000] [--runs 7] [--only commands|trial]`. The entries are copies of that
of the built-in model, each under the key of another context length, with a binding of their own; their artifacts are
files without data of the right size, since no listing reads one. A trial loads all code of the built-in model's
artifact and runs its probes in a child process (docs/adr/0015-trials.md); starts with the artifact already tried and
starts that try it take turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec

from ..cache.binding import Binding
from ..cache.catalog import entries
from ..cache.config import CacheConfig
from ..cache.key import make_key
from ..cache.record import encode
from ..cache.scratch import Scratch
from ..cache.store import Store
from ..runtime.trial import try_artifact

BAR_S = 0.4
COMMANDS = (("--help",), ("ls",), ("ls", "--json"), ("ls", "--limit", "20"), ("stats",), ("stats", "--json"))


def fill(folder: Path, count: int) -> None:
    """Makes a cache of `count` entries, as a person's would be after years."""
    _run(["warm-cache"], folder)
    store = Store.open(CacheConfig(cache_dir=folder))
    (first,) = entries(store)
    binding = first.bindings[0]
    for number in range(1, count):
        factors = {**first.record.factors, "limits": {**first.record.factors["limits"], "max_length": number}}
        key, mef = make_key(factors), f"{number:064x}"
        record = msgspec.structs.replace(first.record, key=key.digest, factors=factors, mef=mef)
        _sparse(store.blob_path(mef), record.bytes)
        bound: Binding = msgspec.structs.replace(
            binding, digest=f"{number:032x}", key=key.digest, factors=factors, mef=mef
        )
        (store.root / "index" / f"{key.digest}.json").write_bytes(encode(record))
        (store.root / "bindings" / f"{bound.digest}.json").write_bytes(bound.encoded())


def _sparse(path: Path, nbytes: int) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(nbytes)


def _run(command: list[str], folder: Path) -> float:
    """Seconds from start to exit."""
    environment = {**os.environ, "MODULAR_CACHE_DIR": str(folder)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "max", *command], env=environment, capture_output=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise click.ClickException(f"max {' '.join(command)} failed: {done.stderr.decode()[-500:]}")
    return seconds


def measure_commands(folder: Path, runs: int) -> None:
    """Prints the median of each command beside the bar."""
    click.echo(f"{'command':24} {'median':>8}   {'min-max':>12} {'of the bar of 0.4 s':>20}")
    for command in COMMANDS:
        times = [_run(["cache", *command], folder) for _ in range(runs)]
        median = statistics.median(times)
        verdict = "meets" if median <= BAR_S else "MISSES"
        name = "cache " + " ".join(command)
        click.echo(f"{name:24} {median:8.3f} s {_spread(times):>12} {median / BAR_S:12.2f} {verdict}")


def measure_trial(runs: int) -> None:
    """Prints what a start takes that tries its artifact first, and one that finds a verdict."""
    command = ["generate", "--prompt", "robot:", "--max-new-tokens", "16", "--temperature", "0"]
    rows: dict[str, list[float]] = {"start, tried before": [], "start with a trial": [], "the trial alone": []}
    with Scratch("bench") as scratch:
        cache = scratch.path / "cache"
        _run(command, cache)
        store = Store.open(CacheConfig(cache_dir=cache))
        (entry,) = entries(store)
        for _ in range(runs):
            rows["start, tried before"].append(_run(command, cache))
            for verdict in (cache / "verdicts").iterdir():
                verdict.unlink()
            rows["start with a trial"].append(_run(command, cache))
            started = time.perf_counter()
            trouble = try_artifact(store.blob_path(entry.record.mef))
            rows["the trial alone"].append(time.perf_counter() - started)
            assert not trouble, trouble
    before = statistics.median(rows["start, tried before"])
    click.echo(f"{'built-in model':24} {'median':>8}   {'min-max':>12} {'of a start without':>20}")
    for name, times in rows.items():
        median = statistics.median(times)
        click.echo(f"{name:24} {median:8.3f} s {_spread(times):>12} {median / before:12.2f}")


def _spread(times: list[float]) -> str:
    return f"{min(times):.3f}-{max(times):.3f}"


@click.command()
@click.option("--entries", "count", default=1000, show_default=True)
@click.option("--runs", default=7, show_default=True, help="Runs of each command; the median counts.")
@click.option("--folder", type=click.Path(path_type=Path), help="A cache that an earlier run has filled, or will.")
@click.option("--only", type=click.Choice(["commands", "trial"]), help="Leave out the other half.")
def main(count: int, runs: int, folder: Path | None, only: str | None) -> None:
    """Measure the commands of `max cache`, and trials, and print them beside their bar."""
    if only != "trial":
        with Scratch("bench") as scratch:
            place = folder or scratch.path
            if not (place / "index").is_dir():
                fill(place, count)
            measure_commands(place, runs)
    if only != "commands":
        measure_trial(runs)


if __name__ == "__main__":
    main()
