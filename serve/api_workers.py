"""Further API processes beside the first: started with it, replaced when one ends, drained before it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys

from .api_worker_config import ApiWorkerConfig
from .metrics import forget_process

logger = logging.getLogger(__name__)
_MODULE = __name__.rpartition(".")[0] + ".api_worker"
_PAUSE_S = 1.0


class ApiWorkers:
    """So many of them on one listening socket."""

    def __init__(self, config: ApiWorkerConfig, listener: socket.socket, count: int) -> None:
        self._config, self._listener, self._count = config, listener, count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watches: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts them; call it on the event loop."""
        self._watches = [asyncio.create_task(self._keep(number)) for number in range(self._count)]

    async def _keep(self, number: int) -> None:
        while True:
            process = self._spawn()
            self._processes.append(process)
            code = await asyncio.to_thread(process.wait)
            self._processes.remove(process)
            forget_process(process.pid)
            logger.error("API worker %d ended with code %d; starting another", number, code)
            await asyncio.sleep(_PAUSE_S)

    def _spawn(self) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            env=environ,
            pass_fds=(self._listener.fileno(),),
            process_group=0,
        )
        assert process.stdin is not None
        process.stdin.write(self._config.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        return process

    async def stop(self) -> None:
        """Lets them drain, each within the server's own limit, and waits for their ends."""
        for watch in self._watches:
            watch.cancel()
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        await asyncio.gather(*(asyncio.to_thread(process.wait) for process in self._processes))

    def kill(self) -> None:
        """Ends them at once."""
        for process in self._processes:
            process.kill()
