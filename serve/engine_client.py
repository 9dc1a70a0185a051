"""The engine as an API process reaches it: EnginePort over ZMQ, for any number of processes beside one another.

A connection is good for the life of one worker. When it breaks, its requests fail, and a new one waits for the next
worker, so that nothing meant for one can reach another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Self

import msgspec
import zmq

from .. import CapacityError, Kind, MaxError, RequestError
from .engine_port import EngineUnavailable, State
from .messages import (
    Abort,
    Ended,
    FromWorker,
    Hello,
    Loading,
    PrefixCacheReset,
    Ready,
    ResetPrefixCache,
    StartFailed,
    StepStats,
    StoreStats,
    Submit,
    Tokens,
    ToWorker,
)
from .supervisor import Supervisor

logger = logging.getLogger(__name__)
_RECONNECT_MS = 20
_LOST = ("the engine worker has ended", "It is started anew; send the request again in a moment.")


@dataclass(eq=False)
class _Stream:
    """What has come for one request and was not taken yet."""

    tokens: list[Tokens] = field(default_factory=list)
    waiting_since: float = 0.0
    """When the oldest of `tokens` came, by perf_counter."""
    error: MaxError | None = None
    is_over: bool = False
    waiter: asyncio.Future[None] | None = None

    def push(self, tokens: Tokens) -> None:
        if not self.tokens:
            self.waiting_since = perf_counter()
        self.tokens.append(tokens)
        self.is_over = tokens.finish_reason is not None
        self._wake()

    def fail(self, error: MaxError) -> None:
        self.error, self.is_over = error, True
        self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class _Connection:
    """A socket to the worker, whose frames and whose end come as calls on the event loop."""

    def __init__(
        self, context: zmq.Context, endpoint: str, take: Callable[[FromWorker], None], lost: Callable[[], None]
    ) -> None:
        self._take, self._lost = take, lost
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.DEALER)
        for option, value in ((zmq.SNDHWM, 0), (zmq.RCVHWM, 0), (zmq.LINGER, 0), (zmq.RECONNECT_IVL, _RECONNECT_MS)):
            self._socket.set(option, value)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._decoder = msgspec.msgpack.Decoder(list[FromWorker])
        self._encoder = msgspec.msgpack.Encoder()
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._loop.add_reader(self._monitor.fileno(), self._read_monitor)
        self._loop.call_soon(self._read_monitor)
        self._socket.connect(endpoint)
        self.send(Hello())

    def send(self, message: ToWorker) -> None:
        self._socket.send(self._encoder.encode([message]))
        self._loop.call_soon(self._read)

    # A file descriptor of ZMQ announces the first thing that happens after EVENTS was asked for, and nothing else.

    def _read(self) -> None:
        while not self._socket.closed and self._socket.get(zmq.EVENTS) & zmq.POLLIN:
            for message in self._decoder.decode(self._socket.recv(zmq.NOBLOCK)):
                self._take(message)

    def _read_monitor(self) -> None:
        if not self._socket.closed and self._monitor.get(zmq.EVENTS) & zmq.POLLIN:
            self._read()  # what the worker said last
            self._lost()

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_reader(self._monitor.fileno())
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)


class EngineClient:
    """An EnginePort. `async with` it on the event loop that uses it."""

    def __init__(self, endpoint: str, supervisor: Supervisor | None = None) -> None:
        """supervisor: of the worker at `endpoint`, where this process is the one that keeps it running"""
        self._endpoint, self._supervisor = endpoint, supervisor
        self._watch: asyncio.Task[StartFailed | None] | None = None
        self._context = zmq.Context()
        self._connection: _Connection | None = None
        self._streams: dict[str, _Stream] = {}
        self._resets: list[asyncio.Future[int]] = []
        self._listeners: list[Callable[[StepStats], None]] = []
        self._store_listeners: list[Callable[[StoreStats], None]] = []
        self._take_listeners: list[Callable[[int, float, int], None]] = []
        self._buffered = 0
        self._ready: Ready | None = None
        self._progress: Loading | StartFailed | None = None
        self._is_connected = self._is_draining = False
        self._is_quiet = asyncio.Event()

    async def __aenter__(self) -> Self:
        if self._supervisor is not None:
            self._watch = asyncio.create_task(self._supervisor.run())
        self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain(0.0)

    def _connect(self) -> None:
        self._connection = _Connection(self._context, self._endpoint, self._take, self._lose)

    # --- what the worker says ---

    def _take(self, message: FromWorker) -> None:
        match message:
            case Tokens():
                self._take_tokens(message)
            case Ended():
                if stream := self._streams.get(message.id):
                    stream.fail(_error(message))
                    self._forget(message.id)
            case StepStats():
                for listener in self._listeners:
                    listener(message)
            case StoreStats():
                for listener in self._store_listeners:
                    listener(message)
            case PrefixCacheReset():
                if self._resets and not (waiter := self._resets.pop(0)).done():
                    waiter.set_result(message.pages)
            case Ready():
                self._ready, self._is_connected = message, True
            case Loading() | StartFailed():
                self._progress = message

    def _take_tokens(self, message: Tokens) -> None:
        stream = self._streams.get(message.id)
        if stream is not None:  # None: it was aborted, which the worker did not know yet
            stream.push(message)
            self._buffered += 1
            if stream.is_over:
                self._forget(message.id)

    def _forget(self, id: str) -> None:
        self._streams.pop(id, None)
        if not self._streams:
            self._is_quiet.set()

    def _lose(self) -> None:
        """Fails what the worker had in work, and waits for the next one."""
        assert self._connection is not None
        self._connection.close()
        self._is_connected = False
        self._fail_all(MaxError(*_LOST))
        self._connect()

    def _fail_all(self, error: MaxError) -> None:
        for id, stream in list(self._streams.items()):
            stream.fail(error)
            self._forget(id)
        for waiter in self._resets:
            if not waiter.done():
                waiter.set_exception(error)
        self._resets.clear()

    # --- EnginePort ---

    @property
    def state(self) -> State:
        if self._supervisor is not None and self._supervisor.failure is not None:
            return "failed"
        if self._is_draining:
            return "draining"
        if self._is_connected:
            return "ready"
        return "restarting" if self._ready else "starting"

    @property
    def ready(self) -> Ready | None:
        return self._ready

    @property
    def progress(self) -> Loading | StartFailed | None:
        return (self._supervisor.failure if self._supervisor else None) or self._progress

    async def generate(self, request: Submit) -> AsyncGenerator[list[Tokens]]:
        connection = self._ready_connection()
        if request.id in self._streams:
            raise RequestError(f"a request {request.id} is in work already", "Give each request its own id.")
        stream = self._streams[request.id] = _Stream()
        self._is_quiet.clear()
        connection.send(request)
        try:
            while True:
                if stream.tokens:
                    batch, stream.tokens = stream.tokens, []
                    self._buffered -= len(batch)
                    for listener in self._take_listeners:
                        listener(len(batch), perf_counter() - stream.waiting_since, self._buffered)
                    yield batch
                elif stream.error is not None:
                    raise stream.error
                elif stream.is_over:
                    return
                else:
                    stream.waiter = asyncio.get_running_loop().create_future()
                    await stream.waiter
        finally:
            self._buffered -= len(stream.tokens)
            if not stream.is_over:
                self._forget(request.id)
                connection.send(Abort(request.id))

    def _ready_connection(self) -> _Connection:
        if self.state != "ready" or self._connection is None:
            raise EngineUnavailable(f"the engine takes no requests now: it is {self.state}", "Try again in a moment.")
        return self._connection

    async def reset_prefix_cache(self) -> int:
        connection = self._ready_connection()
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._resets.append(waiter)
        connection.send(ResetPrefixCache())
        return await waiter

    def on_step(self, listener: Callable[[StepStats], None]) -> None:
        self._listeners.append(listener)

    def on_store(self, listener: Callable[[StoreStats], None]) -> None:
        self._store_listeners.append(listener)

    def on_take(self, listener: Callable[[int, float, int], None]) -> None:
        self._take_listeners.append(listener)

    def refuse(self) -> None:
        """Takes no new requests from now on; `drain` follows."""
        self._is_draining = True

    async def drain(self, seconds: float) -> None:
        self.refuse()
        if self._streams:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_quiet.wait(), seconds)
        if self._connection is not None:
            for id in self._streams:
                self._connection.send(Abort(id))
            self._fail_all(EngineUnavailable("the server is shutting down", "Send the request to another one."))
            self._connection.close()
            self._connection, self._is_connected = None, False
        if self._supervisor is not None:
            await self._supervisor.stop()
        if self._watch is not None:
            await self._watch
        self._context.term()

    async def failed(self) -> StartFailed:
        """Waits until the supervisor gives up, and says why; for ever where it does not, or where there is none."""
        failure = await asyncio.shield(self._watch) if self._watch is not None else None
        return failure or await asyncio.get_running_loop().create_future()


def _error(ended: Ended) -> MaxError:
    if ended.how == "aborted":
        return EngineUnavailable("the request was aborted", "Send it again.")
    kinds: dict[Kind, type[MaxError]] = {"user": RequestError, "capacity": CapacityError, "internal": MaxError}
    return kinds[ended.kind](ended.message, ended.hint)
