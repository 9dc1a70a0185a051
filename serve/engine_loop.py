"""The worker's loop: takes what clients ask, computes a step, says what came of it."""

from __future__ import annotations

import logging
import math
import time
from typing import Literal, NoReturn

from .. import CapacityError, MaxError
from ..cache.counters import Counters
from ..runtime.engine import Engine
from ..runtime.model import Executables
from ..runtime.request import Request
from ..runtime.sampling import SamplingParams, TokenLogprobs
from ..runtime.step_results import EngineLost, StepReport, Token
from .messages import (
    Abort,
    Ended,
    Hello,
    Loading,
    Logprobs,
    PrefixCacheReset,
    Ready,
    ResetPrefixCache,
    Sampling,
    StartFailed,
    StepStats,
    StoreStats,
    Submit,
    Tokens,
    ToWorker,
)
from .worker_link import WorkerLink

logger = logging.getLogger(__name__)
_IDLE_MS = 1000
"""Executables are loaded and the store is used between steps too, which clients are told in this time."""


class EngineLoop:
    """Runs an engine for the clients of a link.

    A request's name in the engine is its client's, a colon, and its own: clients do not know of one another.
    """

    def __init__(self, link: WorkerLink) -> None:
        self.news: Loading | Ready | StartFailed | None = None
        """What every client has been told about the start."""
        self._engine: Engine | None = None
        self._executables: Executables | None = None
        self._counters: Counters | None = None
        self._stored: StoreStats | None = None
        self._link = link
        self._clients: list[bytes] = []
        """All of them are told of every step; one of them counts it."""
        self._step_began: float | None = None

    def announce(self, news: Loading | Ready | StartFailed) -> None:
        """Tells all clients how the start goes, and those that come later."""
        self.news = news
        for client in self._clients:
            self._link.say(client, news)

    def open(self, engine: Engine, executables: Executables | None = None, counters: Counters | None = None) -> None:
        """Takes requests for this engine from now on.

        executables, counters: those that are loaded, and what was done with the store, of which clients are told
        """
        self._engine, self._executables, self._counters = engine, executables, counters

    def run(self) -> NoReturn:
        """Works for ever; raises EngineLost when a step has taken the pages with it."""
        assert self._engine is not None
        while True:
            self.turn(_IDLE_MS if self._engine.is_idle else math.ceil(1e3 * self._engine.pause_s))

    def turn(self, wait_ms: int | None) -> None:
        """Takes what has come, at most after so long a wait, and computes one step."""
        try:
            for client, message in self._link.receive(wait_ms):
                self._take(client, message)
            if self._engine is not None:
                self._step(self._engine)
            self._say_stored()
        finally:
            for gone in self._link.flush():
                self._forget(gone)

    @property
    def stalled_s(self) -> float:
        """Seconds since the step in work began; 0 between steps."""
        began = self._step_began  # another thread asks
        return 0.0 if began is None else time.monotonic() - began

    def _step(self, engine: Engine) -> None:
        self._step_began = None if engine.is_idle else time.monotonic()
        try:
            results = engine.step()
        except EngineLost as lost:
            for failure in lost.failures:
                self._say_ended(failure.request_id, "failed", failure.error)
            raise
        finally:
            self._step_began = None
        for result in results:
            if isinstance(result, Token):
                self._say_token(result)
            else:
                self._say_ended(result.request_id, "failed", result.error)
        report = engine.stats.take_last_step()
        if report is not None and self._clients:
            stats = _step_stats(engine, report)
            for client in self._clients:
                self._link.say(client, stats)

    def _say_stored(self) -> None:
        if self._counters is None:
            return
        loaded = 0 if self._executables is None else self._executables.num_loaded
        stored = StoreStats(self._counters.to_json(), loaded)
        if stored != self._stored:
            self._stored = stored
            for client in self._clients:
                self._link.say(client, stored)

    def _take(self, client: bytes, message: ToWorker) -> None:
        match message:
            case Hello():
                self._clients.append(client)
                for known in (self.news, self._stored):
                    if known is not None:
                        self._link.say(client, known)
            case Submit():
                self._submit(client, message)
            case Abort():
                if self._engine is not None and self._engine.abort(_name(client, message.id)):
                    self._link.say(client, Ended(message.id, "aborted"))
            case ResetPrefixCache():
                pages = 0 if self._engine is None else self._engine.reset_prefix_cache()
                self._link.say(client, PrefixCacheReset(pages))

    def _submit(self, client: bytes, message: Submit) -> None:
        name = _name(client, message.id)
        try:
            if self._engine is None:
                raise CapacityError("the engine is still starting", "Try again in a few seconds.")
            self._engine.add(_request(name, message))
        except MaxError as error:
            self._say_ended(name, "rejected", error)
        except Exception as error:  # whatever a request holds, it must not end the others
            logger.exception("a request cannot be taken")
            self._say_ended(name, "failed", MaxError(f"internal error: {type(error).__name__}: {error}"))

    def _say_token(self, token: Token) -> None:
        client, id = _parts(token.request_id)
        logprobs = None if token.logprobs is None else [_logprobs(token.logprobs)]
        scores = None if token.prompt_logprobs is None else [_logprobs(each) for each in token.prompt_logprobs]
        self._link.say(client, Tokens(id, [token.id], logprobs, token.finish_reason, token.cached_tokens, scores))

    def _say_ended(self, name: str, how: Literal["rejected", "failed"], error: MaxError) -> None:
        client, id = _parts(name)
        self._link.say(client, Ended(id, how, error.kind, error.message, error.hint))

    def _forget(self, client: bytes) -> None:
        """Drops the requests of a client that has gone."""
        if client in self._clients:
            self._clients.remove(client)
        if self._engine is not None:
            prefix = _name(client, "")
            for name in [name for name in self._engine.request_ids if name.startswith(prefix)]:
                self._engine.abort(name)


def _name(client: bytes, id: str) -> str:
    return f"{client.hex()}:{id}"


def _parts(name: str) -> tuple[bytes, str]:
    client, _, id = name.partition(":")
    return bytes.fromhex(client), id


def _request(name: str, message: Submit) -> Request:
    """Raises RequestError for sampling parameters out of their ranges."""
    return Request(
        name,
        message.prompt_ids,
        _sampling(message.sampling),
        message.max_new_tokens,
        message.min_new_tokens,
        frozenset(message.stop_token_ids),
        message.ignore_eos,
        message.top_logprobs,
        message.cache_salt,
        message.prompt_logprobs,
    )


def _logprobs(given: TokenLogprobs) -> Logprobs:
    return Logprobs(given.token, given.top_ids, given.top)


def _sampling(given: Sampling) -> SamplingParams:
    return SamplingParams(**{name: getattr(given, name) for name in given.__struct_fields__})


def _step_stats(engine: Engine, report: StepReport) -> StepStats:
    scheduler = engine.scheduler
    return StepStats(
        batch_type="CE" if report.is_prefill else "TG",
        batch_size=report.batch_size,
        input_tokens=report.input_tokens,
        new_tokens=report.new_tokens,
        context_tokens=report.context_tokens,
        queued=len(scheduler.waiting),
        running=len(scheduler.running),
        execution_s=report.execution_seconds,
        creation_s=report.creation_seconds,
        terminated=report.terminated,
        used_pages=scheduler.pages.num_pages - scheduler.pages.free,
        num_pages=scheduler.pages.num_pages,
        total_preempted=scheduler.preempted,
        total_cache_hit_tokens=scheduler.hit_tokens,
        total_cache_miss_tokens=scheduler.miss_tokens,
        total_cache_hit_pages=scheduler.hit_pages,
    )
