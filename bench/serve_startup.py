"""How long a server takes from the start of its process to the first request that it answers.

`python -m max.bench.serve_startup [--runs 5] [-- --model DIR]`: what stands behind `--` goes to `max serve`. The first
run fills the cache where it is empty, and is not counted.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_LIMIT_S = 600.0
_PAUSE_S = 0.01


def first_answer(program: Sequence[str], arguments: Sequence[str], cache: Path | None = None) -> float:
    """Starts `max serve` and asks until it answers; returns seconds. Raises RuntimeError when it ends before."""
    port = free_port()
    command = [*program, "serve", "--port", str(port), "--served-model-name", "m", "--log-level", "error", *arguments]
    environ = os.environ | ({} if cache is None else {"MODULAR_CACHE_DIR": str(cache)})
    started = time.perf_counter()
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_answer(server, port, "m")
            return time.perf_counter() - started
        finally:
            server.terminate()


def wait_for_answer(server: subprocess.Popen[bytes], port: int, model: str) -> None:
    """Returns when a completion of `model` has been answered. Raises RuntimeError when the server ends before."""
    ends = time.monotonic() + _LIMIT_S
    while not _answers(port, model):
        if server.poll() is not None or time.monotonic() > ends:
            raise RuntimeError(f"{server.args} did not answer; exit code {server.poll()}")
        time.sleep(_PAUSE_S)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _answers(port: int, model: str) -> bool:
    """Whether a completion of one token is answered; a checkpoint without a template has no chat."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT_S)
    body = json.dumps({"model": model, "prompt": "robot:", "max_tokens": 1})
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def main() -> None:
    """Measures, prints every run and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("arguments", nargs="*", help="of max serve, behind --")
    given = parser.parse_args()
    program = [sys.executable, "-m", "max"]
    seconds = [first_answer(program, given.arguments) for _ in range(given.runs + 1)][1:]
    runs = ", ".join(f"{each:.2f}" for each in seconds)
    print(f"first answer after {statistics.median(seconds):.2f} s; runs: {runs}")


if __name__ == "__main__":
    main()
