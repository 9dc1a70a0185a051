"""Keeps a server busy for a while and watches its memory: `python -m max.bench.soak --minutes 20 -- --model ./llama`.

Requests of random lengths come and go at a steady concurrency; some begin alike, some are dropped half-way, some cannot
be answered. The resident memory of every process of the server is read at equal intervals: it may not grow after the
first quarter, in which pages and pools fill. What stands behind `--` goes to `max serve`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PATIENCE_S = 300.0


@dataclass
class Result:
    """Requests by their ends, tokens that were streamed, and resident memory in MB by process, at equal intervals."""

    ended: Counter[str] = field(default_factory=Counter)
    chunks: int = 0
    memory_mb: dict[str, list[float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def summary(self) -> dict[str, Any]:
        """What a person wants to know of it."""
        memory = {
            name: {"first": round(samples[0]), "last": round(samples[-1]), "growth": round(growth(samples), 1)}
            for name, samples in self.memory_mb.items()
        }
        return {"ended": dict(self.ended), "chunks": self.chunks, "memory_mb": memory}


def growth(samples: Sequence[float]) -> float:
    """How much the last quarter's median lies above the second quarter's."""
    quarter = len(samples) // 4
    if not quarter:
        return 0.0
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


def soak(arguments: Sequence[str], seconds: float, concurrency: int, samples: int = 200) -> Result:
    """Runs `max serve` with these arguments, and load for so long; raises TimeoutError when it does not get ready."""
    port = _free_port()
    command = [sys.executable, "-m", "max", "serve", "--port", str(port), *arguments]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    result = Result()
    try:
        _wait_until_ready(server, port)
        ends = time.monotonic() + seconds
        with ThreadPoolExecutor(concurrency) as pool:
            work = [pool.submit(_client, port, ends, seed, result) for seed in range(concurrency)]
            while (left := ends - time.monotonic()) > 0:
                time.sleep(min(left, seconds / samples))
                for name, resident in _memory_of(server.pid).items():
                    result.memory_mb.setdefault(name, []).append(resident)
            for each in work:
                each.result()
    finally:
        server.terminate()
        server.wait(60)
    return result


def _client(port: int, ends: float, seed: int, result: Result) -> None:
    rng = random.Random(seed)
    while time.monotonic() < ends:
        how, chunks = _request(port, rng)
        with result.lock:
            result.ended[how] += 1
            result.chunks += chunks


def _request(port: int, rng: random.Random) -> tuple[str, int]:
    """One completion: how it ended, and how many pieces of text came."""
    words = int(150 * rng.random() ** 3) + 1  # mostly short ones
    first = rng.randrange(4) if rng.random() < 0.3 else rng.randrange(1000)
    body = {
        "prompt": " ".join(f"word{first} and {i}" for i in range(words)),
        "max_tokens": rng.randint(1, 60),
        "temperature": rng.choice([0, 1]) if rng.random() > 0.05 else -1,
        "stream": True,
    }
    drops = rng.random() < 0.1
    chunks = 0
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            if response.status != 200:
                return str(response.status), 0
            while line := response.readline():
                chunks += line.startswith(b"data: {")
                if drops and chunks:
                    return "dropped", chunks
    return "finished", chunks


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    ends = time.monotonic() + _PATIENCE_S
    while time.monotonic() < ends:
        if server.poll() is not None:
            raise SystemExit(server.returncode)  # it has said why
        with suppress(OSError), closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/readyz")
            with connection.getresponse() as response:
                if response.status == 200:
                    return
        time.sleep(0.1)
    raise TimeoutError("the server does not become ready")


def _memory_of(pid: int) -> dict[str, float]:
    """Resident MB of a process and of its children, by what they are."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    processes = {"api": str(pid)} | {f"child {i}": child for i, child in enumerate(children)}
    found = {}
    for name, each in processes.items():
        with suppress(OSError):
            pages = int(Path(f"/proc/{each}/statm").read_text().split()[1])
            found[name] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Runs the soak and prints its result as JSON."""
    parser = argparse.ArgumentParser(description="Keeps a server busy for a while and watches its memory.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("arguments", nargs="*", help="of max serve, behind --")
    given = parser.parse_args()
    print(json.dumps(soak(given.arguments, 60 * given.minutes, given.concurrency).summary()))


if __name__ == "__main__":
    main()
