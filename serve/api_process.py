"""One API process: HTTP over a listening socket until a signal comes, then a drain."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import MaxError
from .api_error import ApiError
from .api_workers import ApiWorkers
from .app import create_app
from .config import ServerConfig
from .engine_port import EnginePort
from .listener import BACKLOG, url_of
from .messages import Ready, StartFailed
from .metrics import Metrics
from .service import Service
from .text_side import TextSide

logger = logging.getLogger(__name__)

_FLUSH_S = 5
_WATCH_S = 0.05


class ServedEngine(EnginePort, Protocol):
    """An engine over whose life a server watches."""

    def refuse(self) -> None:
        """Takes no new requests from now on; `drain` follows."""
        ...

    async def failed(self) -> StartFailed:
        """Waits until the engine cannot be kept running, and says why."""
        ...


@dataclass
class ApiProcess:
    """What one API process serves, and where."""

    config: ServerConfig
    model_name: str
    text: Future[TextSide]
    listener: socket.socket
    metrics: Metrics
    metrics_listener: socket.socket | None = None

    async def run(self, port: ServedEngine, others: ApiWorkers | None = None) -> None:
        """Serves, beside `others`, until SIGTERM or SIGINT, then lets requests finish; a second signal cuts that short.

        Raises MaxError when the engine cannot be started, or cannot be kept running.
        """
        service = Service(port, self.text, self.config, self.model_name, self.metrics)
        with _signals() as signals:
            async with self._listening(service):
                if others is not None:
                    others.start()
                watch = asyncio.create_task(self._follow(port))
                gone = asyncio.create_task(port.failed())
                stop = asyncio.create_task(signals.get())
                done, _ = await asyncio.wait((watch, gone, stop), return_when=asyncio.FIRST_COMPLETED)
                for task in (watch, gone, stop):
                    task.cancel()
                try:
                    if gone in done:
                        raise _start_error(gone.result())
                    if watch in done:
                        watch.result()
                finally:
                    await self._drain(port, others, signals)

    async def _drain(self, port: ServedEngine, others: ApiWorkers | None, signals: asyncio.Queue[int]) -> None:
        """Lets requests finish, those of other processes too, as long as the configuration and the user allow."""
        logger.info("shutting down: requests in work have %g s to finish", self.config.shutdown_timeout)
        deadline = asyncio.get_running_loop().time() + self.config.shutdown_timeout

        async def finish() -> None:
            port.refuse()
            if others is not None:
                await others.stop()
            await port.drain(max(0.0, deadline - asyncio.get_running_loop().time()))

        work, again = asyncio.create_task(finish()), asyncio.create_task(signals.get())
        await asyncio.wait((work, again), return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            if others is not None:
                others.kill()
            await port.drain(0.0)

    async def _follow(self, port: ServedEngine) -> None:
        """Says once for every start of the worker that it is ready. Raises MaxError when the text side is broken."""
        seen: Ready | None = None
        while True:
            if self.text.done():
                self.text.result()
            if port.state == "ready" and port.ready is not seen and (seen := port.ready) is not None:
                self.metrics.became_ready(seen)
                facts = {"model": self.model_name, "at": url_of(self.listener), "executables": seen.artifact_source}
                logger.info("ready", extra={"facts": facts})
            await asyncio.sleep(_WATCH_S)

    @asynccontextmanager
    async def _listening(self, service: Service) -> AsyncIterator[None]:
        servers = [_server(create_app(service), self.config)]
        sockets = [self.listener]
        if self.metrics_listener is not None:
            servers.append(_server(_metrics_only(self.metrics), self.config))
            sockets.append(self.metrics_listener)
        tasks = [
            asyncio.create_task(server.serve([listener])) for server, listener in zip(servers, sockets, strict=True)
        ]
        try:
            yield
        finally:
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*tasks)


class _Server(uvicorn.Server):
    """Leaves signals alone: what they mean is decided above."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: ASGIApp, config: ServerConfig) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=config.keep_alive_timeout,
            timeout_graceful_shutdown=_FLUSH_S,
        )
    )


def _metrics_only(metrics: Metrics) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics":
            answer = metrics.response()
        else:
            answer = ApiError(404, "This port answers /metrics only.", code="not_found").response()
        await answer(scope, receive, send)

    return app


@contextmanager
def _signals() -> Iterator[asyncio.Queue[int]]:
    """SIGTERM and SIGINT as they come."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[int]()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, queue.put_nowait, number)
    try:
        yield queue
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _start_error(failure: StartFailed) -> MaxError:
    error = MaxError(failure.message, failure.hint)
    error.kind = failure.kind
    return error
