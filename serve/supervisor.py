"""Keeps an engine worker running: starts it, notices its end at once, starts it anew, and gives up when that is no use.

The worker's stdin is held open as long as this process lives, and its stdout says how its start goes; the end of its
stdout is its own end, whatever the cause.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from .. import ConfigError
from ..cache.scratch import Scratch
from .messages import Loading, Ready, StartFailed
from .worker_config import WorkerConfig

logger = logging.getLogger(__name__)
_MODULE = __name__.rpartition(".")[0] + ".worker"
_MAX_FAILED_STARTS = 4
_STEADY_S = 60.0  # a worker that has lived so long may be started anew at once
_LONGEST_PAUSE_S = 15.0
_STOP_S = 5.0
_LONGEST_PATH = 100  # bytes of a socket's path that every system takes
_News = Loading | Ready | StartFailed


class Supervisor:
    """One worker at a time. Starts the first when it is made, so that it loads while its maker goes on importing."""

    def __init__(self, config: WorkerConfig, endpoint_base: str | None = None) -> None:
        """endpoint_base: `ipc://` and a folder for the sockets; a fresh one without. Raises ConfigError for others."""
        self._config = config
        if endpoint_base is None:
            self._scratch: Scratch | None = Scratch("serve")
            self._folder = self._scratch.path
        else:
            self._scratch, self._folder = None, _socket_folder(endpoint_base)
        self.endpoint = f"ipc://{self._folder}/engine"
        self.failure: StartFailed | None = None
        """Why the worker cannot be started; None as long as it is, or will be tried again."""
        self.restarts = 0
        self._is_stopping = False
        self._process = self._spawn()

    @property
    def pid(self) -> int:
        """Of the worker that was started last."""
        return self._process.pid

    def _spawn(self) -> subprocess.Popen[bytes]:
        # It finds the modules that this process finds, and is not reached by a signal to all processes of a terminal.
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-m", _MODULE, self.endpoint]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, env=environ, process_group=0)
        assert process.stdin is not None
        config = self._config.model_copy(update={"spawned": time.time()})
        with suppress(BrokenPipeError):  # it has ended already, which `run` will notice
            process.stdin.write(config.model_dump_json().encode() + b"\n")
        return process

    async def run(self) -> StartFailed | None:
        """Watches the worker until `stop`, and starts it anew when it ends; returns why that cannot be done."""
        failed_starts = quick_ends = 0
        has_been_ready = False
        while True:
            began = time.monotonic()
            news = await self._follow()
            code = await asyncio.to_thread(self._process.wait)
            self._close_stdin()
            if self._is_stopping:
                return None
            error = news if isinstance(news, StartFailed) else _ended(code)
            logger.error("%s", error.message)
            failed_starts = 0 if isinstance(news, Ready) else failed_starts + 1
            has_been_ready = has_been_ready or isinstance(news, Ready)
            # What kept the first worker from starting will keep the next one.
            is_hopeless = not has_been_ready and isinstance(news, StartFailed)
            if is_hopeless or failed_starts >= _MAX_FAILED_STARTS:
                self.failure = error
                return error
            quick_ends = quick_ends + 1 if time.monotonic() - began < _STEADY_S else 0
            await asyncio.sleep(_pause(quick_ends))
            if self._is_stopping:
                return None
            self.restarts += 1
            logger.warning("starting the engine worker anew")
            self._process = self._spawn()

    async def _follow(self) -> _News | None:
        """Reads what the worker says until it ends; returns what it said last."""
        assert self._process.stdout is not None
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, self._process.stdout)
        decoder = msgspec.json.Decoder(_News)
        news: _News | None = None
        try:
            async for line in reader:
                news = decoder.decode(line)
                if isinstance(news, Ready):
                    logger.info("engine ready seconds=%s", news.seconds)
        finally:
            transport.close()
        return news

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def stop(self) -> None:
        """Ends the worker, whatever it does, and removes its sockets."""
        self._is_stopping = True
        self._close_stdin()
        try:
            await asyncio.to_thread(self._process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        (self._folder / "engine").unlink(missing_ok=True)
        if self._scratch:
            self._scratch.remove()


def _socket_folder(base: str) -> Path:
    """The folder for sockets that the operator names, private to this user. Raises ConfigError."""
    folder = Path(base.removeprefix("ipc://"))
    if not base.startswith("ipc://") or not folder.is_absolute():
        raise ConfigError(f"--zmq-endpoint-base is {base}", "Give ipc:// and the absolute path of a folder.")
    if len(os.fsencode(folder)) > _LONGEST_PATH - len("/engine"):
        raise ConfigError(f"the path of --zmq-endpoint-base {base} is too long for a socket", "Give a shorter one.")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"--zmq-endpoint-base {base}: {error.strerror}", "Give a folder that can be made.") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"others could reach the sockets in {folder}", "Give a folder that is yours alone: chmod 700, or a new one."
        )
    return folder


def _ended(code: int) -> StartFailed:
    """What to say of a worker that ended without a word of its own."""
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    hint = "Its last words are above; out of memory is a common cause of SIGKILL."
    return StartFailed("internal", f"the engine worker ended {how}", hint)


def _pause(quick_ends: int) -> float:
    """Seconds before the next start: none after a first crash, then longer and longer."""
    return 0.0 if quick_ends <= 1 else min(0.25 * 2 ** (quick_ends - 2), _LONGEST_PAUSE_S)
