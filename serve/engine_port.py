"""The engine as the API sees it: asynchronous, whichever process or stub stands behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Literal, Protocol

from .. import CapacityError
from .messages import Loading, Ready, StartFailed, StepStats, StoreStats, Submit, Tokens

State = Literal["starting", "ready", "draining", "restarting", "failed"]


class EngineUnavailable(CapacityError):
    """The engine takes no requests now: it starts, restarts, is about to stop, or has failed."""


class EnginePort(Protocol):
    """What the routes call. A restart after a crash of the worker goes from `restarting` back to `ready`."""

    @property
    def state(self) -> State: ...

    @property
    def ready(self) -> Ready | None:
        """What the worker said last when it became ready; kept while it restarts."""
        ...

    @property
    def progress(self) -> Loading | StartFailed | None:
        """What the worker said last before it was ready, or why it could not start."""
        ...

    def generate(self, request: Submit) -> AsyncIterator[list[Tokens]]:
        """The tokens of a request as they come; messages that piled up while the caller was away come together.

        Raises MaxError: RequestError for a request the engine refuses, CapacityError when the queue is full,
        EngineUnavailable when the engine does not take requests now, MaxError of kind internal when the worker died
        or failed.
        Closing the iterator early aborts the request: its pages are free within one step.
        """
        ...

    async def reset_prefix_cache(self) -> int:
        """Forgets the pages that no request uses; how many there were."""
        ...

    def on_step(self, listener: Callable[[StepStats], None]) -> None:
        """Calls `listener` with the statistics of every step, on the event loop."""
        ...

    def on_store(self, listener: Callable[[StoreStats], None]) -> None:
        """Calls `listener` with what the worker has done with its store, whenever that has changed."""
        ...

    def on_take(self, listener: Callable[[int, float, int], None]) -> None:
        """Calls `listener` whenever the iterator of a request is given messages: how many, for how many seconds the
        oldest of them had waited here, and how many still wait for others."""
        ...

    async def drain(self, seconds: float) -> None:
        """Takes no new requests, lets those in work finish within so many seconds, and stops the worker."""
        ...
