"""A further API process: `python -m max.serve.api_worker`, told what to do by one line of JSON on stdin.

It answers on a listening socket that it inherits, reaches the engine worker over ZMQ, and ends when its stdin does.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import uvloop

from . import log_format
from .api_process import ApiProcess
from .api_worker_config import ApiWorkerConfig
from .engine_client import EngineClient
from .metrics import Metrics
from .text_side import TextSide


def main() -> None:
    """Runs the process."""
    with os.fdopen(os.dup(0), "rb", buffering=0) as stdin:  # unbuffered: the rest of it is watched
        config = ApiWorkerConfig.model_validate_json(stdin.readline())
    threading.Thread(target=_end_with_stdin, name="lifeline", daemon=True).start()
    logging.basicConfig(stream=sys.stderr)
    server = config.server
    log_format.set_up(structured=server.structured_logging, prefix=server.log_prefix, level=config.log_level)
    text: Future[TextSide] = ThreadPoolExecutor(1).submit(
        TextSide.load, config.folder, server.chat_template, config.weight_path, config.cache
    )
    process = ApiProcess(
        server,
        config.model_name,
        text,
        socket.socket(fileno=config.listener),
        Metrics(config.model_name, records_steps=False),
    )
    uvloop.run(_run(process, config.endpoint))


async def _run(process: ApiProcess, endpoint: str) -> None:
    async with EngineClient(endpoint) as port:
        await process.run(port)


def _end_with_stdin() -> None:
    """Drains when the process that started this one has gone."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
