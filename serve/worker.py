"""The engine worker: a process of its own that loads a model and serves it to the clients of a ZMQ endpoint.

`python -m max.serve.worker ENDPOINT` reads a WorkerConfig as one line of JSON from stdin. The end of stdin means that
its supervisor has gone, and ends the process. On stdout it tells the supervisor what it does: Loading, then Ready or
StartFailed, each as one line of JSON. Clients are told the same, whenever they come.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import BinaryIO

import msgspec

from ..cache import scratch
from . import log_format
from .engine_loop import EngineLoop
from .messages import Ready
from .worker_config import WorkerConfig
from .worker_link import WorkerLink
from .worker_start import WorkerStart

_POLL_MS = 5
_PACKAGE = __name__.partition(".")[0]
logger = logging.getLogger(_PACKAGE + ".serve.worker")  # __name__ may be __main__


def main(endpoint: str) -> int:
    """Runs the worker. Returns 1 when it cannot start or cannot go on; otherwise it ends with its stdin only."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they may reach every process at once; what they mean, the API decides
    supervisor = _take_stdout()
    config = _read_config()
    threading.Thread(target=_end_with_stdin, name="lifeline", daemon=True).start()
    logging.basicConfig(stream=sys.stderr)
    log_format.set_up(structured=config.structured_logging, prefix=config.log_prefix, level=config.log_level)
    link = WorkerLink(endpoint)
    loop, start = EngineLoop(link), WorkerStart(config)
    while not start.is_over or loop.news is not start.news:
        if loop.news is not start.news:
            loop.announce(start.news)
            supervisor.write(msgspec.json.encode(start.news) + b"\n")
        loop.turn(_POLL_MS)
    if isinstance(start.news, Ready):
        _serve(loop, start, config)
    link.close()
    return 1


def _serve(loop: EngineLoop, start: WorkerStart, config: WorkerConfig) -> None:
    """Takes requests until a step takes the pages with it."""
    loop.open(start.engine, start.executables, start.counters)
    if (limit := config.stall_timeout_s) is not None:
        threading.Thread(target=_end_when_stalled, args=(loop, limit), name="stall", daemon=True).start()
    threading.Thread(target=start.load_rest, name="load the rest", daemon=True).start()
    try:
        loop.run()
    except Exception:
        logger.exception("the engine worker cannot go on")


def _end_when_stalled(loop: EngineLoop, limit_s: float) -> None:
    """Ends the process when there have been requests for so long without a step; the supervisor starts it anew."""
    while True:
        time.sleep(limit_s / 10)
        if loop.stalled_s > limit_s:
            logger.error("no step has ended for %.1f s: the engine worker ends (--decode-stall-timeout-s)", limit_s)
            os._exit(1)


def _take_stdout() -> BinaryIO:
    """The pipe to the supervisor; whatever else writes to stdout goes to stderr from now on."""
    pipe = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return pipe


def _read_config() -> WorkerConfig:
    with os.fdopen(os.dup(0), "rb", buffering=0) as stdin:  # unbuffered: the rest of it is watched
        return WorkerConfig.model_validate_json(stdin.readline())


def _end_with_stdin() -> None:
    """Ends the process when nobody is left who could write to its stdin."""
    while os.read(0, 4096):
        pass
    scratch.remove_all()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
