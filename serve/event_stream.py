"""Answers that stop as soon as their client has gone: server-sent events, and work behind a plain answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .. import MaxError
from .api_error import ApiError, from_max_error

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx would collect the events otherwise.
    "x-accel-buffering": "no",
}


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


async def unless_gone[T](receive: Receive, work: Awaitable[T]) -> T:
    """Awaits `work`; cancels it and raises ClientGone when the client disconnects first.

    receive: of a request whose body has been read, so that only the disconnection can come
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Any, name: str = "") -> bytes:
    """One server-sent event with JSON data."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventStream(Response):
    """Sends events as they are made. An error behind the first event becomes an `error` event and ends the stream."""

    def __init__(self, events: AsyncGenerator[bytes], first: bytes, *, error_name: str = "") -> None:
        """events: an asynchronous generator, closed when the client goes; first: the event that is there already"""
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events, self._first, self._error_name = events, first, error_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for content in events:
                    await send({"type": "http.response.body", "body": content, "more_body": True})
            except (MaxError, ApiError) as error:
                shown = error if isinstance(error, ApiError) else from_max_error(error)
                logger.warning("an answer failed behind its first event: %s", shown.message)
                await send(
                    {"type": "http.response.body", "body": event(shown.body, self._error_name), "more_body": True}
                )
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def open_stream(receive: Receive, events: AsyncGenerator[bytes], *, error_name: str = "") -> EventStream:
    """Waits for the first event, so that what fails before it has a status of its own, and returns the answer."""
    try:
        first = await unless_gone(receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(events, first, error_name=error_name)
