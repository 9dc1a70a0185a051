"""Many processes on one cache: what is made is made once, and whoever is killed leaves nothing half made."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from max.cache.bounds import Bounds
from max.cache.config import CacheConfig
from max.cache.eviction import evict
from max.cache.key import Key
from max.cache.mef import Mef
from max.cache.record import ActionRecord, decode
from max.cache.store import Store

_WORKER = Path(__file__).parent / "store_worker.py"


def start(root: Path, made: Path, keys: int, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(_WORKER), str(root), str(made), str(keys), str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_all(root: Path) -> int:
    """Every entry that is visible is complete and right, at any time; returns how many there are."""
    count = 0
    for path in (root / "index").glob("*.json"):
        record = decode(path.read_bytes(), ActionRecord, path)
        opened = Mef.open(root / "blobs" / record.mef[:2] / record.mef)
        opened.check()
        assert opened.read(opened.sections()[0]) == random.Random(record.factors["number"]).randbytes(200_000)
        count += 1
    return count


@pytest.mark.slow
def test_processes_that_are_killed_leave_nothing_half_made(tmp_path: Path) -> None:
    root, made = tmp_path / "cache", tmp_path / "made"
    Store.open(CacheConfig(cache_dir=root))
    processes = [start(root, made, keys=3, rounds=12) for _ in range(32)]
    chance = random.Random(5)
    victims = processes[::2]
    deadline = time.monotonic() + 240
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        check_all(root)
        if victims and chance.random() < 0.5:
            with contextlib.suppress(ProcessLookupError):
                victims.pop().send_signal(signal.SIGKILL)
        time.sleep(0.02)
    outcomes: Counter[int] = Counter()
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), err
        outcomes[process.returncode] += 1
    assert outcomes[0] >= 16 and outcomes[-signal.SIGKILL] >= 1, outcomes
    assert check_all(root) >= 12
    assert not any((root / "quarantine").iterdir())
    # What the killed ones were writing goes with the next eviction of its age; nothing else is left.
    for path in (*(root / "tmp").iterdir(), *(root / "leases").iterdir()):
        os.utime(path, (1, 1))
    evict(root, Bounds(10**12))
    assert not any((root / "tmp").iterdir()) and not any((root / "leases").iterdir())


def test_processes_that_live_make_everything_once(tmp_path: Path) -> None:
    root, made = tmp_path / "cache", tmp_path / "made"
    processes = [start(root, made, keys=2, rounds=8) for _ in range(8)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    lines = made.read_text().splitlines()
    assert len(lines) == len(set(lines)) == check_all(root)


@pytest.mark.slow
def test_sixteen_cold_starts_compile_once(model: Path, small, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "max", "warm-cache", "--model", str(model), *small, "--json"]
    command += ["--cache-dir", str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(16)
    ]
    reasons: Counter[str] = Counter()
    artifacts = set()
    for process in processes:
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        result = json.loads(out)
        reasons[result["reason"]] += 1
        artifacts.add((result["artifact"], result["weights"]))
    assert reasons["compiled"] == 1 and len(artifacts) == 1, reasons
    assert reasons["bound"] + reasons["same shape"] + reasons["made by another process"] == 15, reasons
    assert len(list((tmp_path / "cache" / "blobs").glob("*/*"))) == 1
    assert not any((tmp_path / "cache" / "leases").iterdir())


def test_clocks_that_differ_do_no_harm(tmp_path: Path) -> None:
    """A file server's clock may be ahead or behind, and so may that of the host that made an entry."""
    root, made = tmp_path / "cache", tmp_path / "made"
    process = start(root, made, keys=2, rounds=4)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    count = check_all(root)
    for far in (-3 * 365 * 86400, 3 * 365 * 86400):
        for path in root.rglob("*"):
            os.utime(path, (time.time() + far, time.time() + far))
        store = Store.open(CacheConfig(cache_dir=root))
        for path in (root / "index").glob("*.json"):
            record = decode(path.read_bytes(), ActionRecord, path)
            assert store.lookup(Key(record.key, record.factors)) is not None
        store.evict()
        assert check_all(root) == count
