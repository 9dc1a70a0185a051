"""Counts a request from its arrival until it is handed to the engine: the backlog on the way in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..service import Service


@asynccontextmanager
async def admitted(service: Service) -> AsyncIterator[None]:
    """Surrounds what is done with a request before the engine has it, such as tokenization."""
    service.metrics.arrived()
    try:
        yield
    finally:
        service.metrics.handed_over()
