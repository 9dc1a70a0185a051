"""How long a server takes from the start of its process to the first request that it answers."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_LIMIT_S = 600.0
_PAUSE_S = 0.01


def first_answer(program: Sequence[str], arguments: Sequence[str], cache: Path) -> float:
    """Starts `max serve` and asks until it answers; returns seconds. Raises RuntimeError when it ends before."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*program, "serve", "--port", str(port), "--served-model-name", "m", "--log-level", "error", *arguments]
    environ = {**os.environ, "MODULAR_CACHE_DIR": str(cache)}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while not _answers(port):
                if server.poll() is not None or time.perf_counter() - started > _LIMIT_S:
                    raise RuntimeError(f"{' '.join(command)} did not answer; exit code {server.poll()}")
                time.sleep(_PAUSE_S)
            return time.perf_counter() - started
        finally:
            server.terminate()


def _answers(port: int) -> bool:
    """Whether a completion of one token is answered; a checkpoint without a template has no chat."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT_S)
    body = json.dumps({"model": "m", "prompt": "robot:", "max_tokens": 1})
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
