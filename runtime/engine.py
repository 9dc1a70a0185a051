"""The engine loop: schedule, run, postprocess. One thread calls it; every request ends in exactly one way.

With overlap, a step is scheduled and launched while the one before it is being computed: the ids that it continues are
taken on the device, and become known here only afterwards. It is used where steps are short, unless told otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from .. import CapacityError, MaxError, RequestError
from ..compiler.limits import Limits
from . import prompt_scores
from .flight import Flight
from .model import Model
from .policy import Policy
from .request import Generation, Request
from .sampling import SampledRow, Sampler, TokenLogprobs
from .scheduler import Chunk, Scheduler
from .step_inputs import StepWriter
from .step_results import EngineLost, EngineStats, Failure, Token

logger = logging.getLogger(__name__)
_SHORT_STEP_S = 0.004
"""Preparing a step takes some 0.3 ms: a fifth of the shortest steps, and nothing beside 40 ms."""


class Engine:
    """Runs requests over the step and sampler models of a text pipeline."""

    def __init__(
        self,
        models: dict[str, Model],
        limits: Limits,
        vocab_size: int,
        *,
        policy: Policy | None = None,
        overlap: bool | None = None,
        max_waiting: int | None = None,
        check_state: Callable[[], None] = lambda: None,
    ) -> None:
        """overlap: whether to prepare a step while another is computed; None for "where steps are short"
        max_waiting: requests that may wait for a row, None for any number
        check_state: raises when the models' pages were lost in a call that failed"""
        self.limits, self.vocab_size, self.max_waiting = limits, vocab_size, max_waiting
        self.scheduler = Scheduler(limits, policy)
        self.stats = EngineStats()
        self._models, self._overlap, self._check_state = models, overlap, check_state
        self._writer = StepWriter(limits)
        self._sampler = Sampler(models, vocab_size, limits.max_batch)
        self._live: dict[str, Generation] = {}
        self._flight: Flight | None = None
        self._landed = 0.0
        self._step_seconds = 1.0

    # --- requests ---

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises RequestError for one that can never be answered and CapacityError when too many wait already; both count
        as rejected.
        """
        try:
            self._check(request)
            if self.max_waiting is not None and self.scheduler.num_waiting(more=1) > self.max_waiting:
                waiting, running = self.scheduler.num_waiting(), len(self.scheduler.running)
                raise CapacityError(f"{running} requests are in work and {waiting} wait already", "Try again later.")
        except (RequestError, CapacityError):
            self.stats.ended["rejected"] += 1
            raise
        self._live[request.id] = self.scheduler.add(request)

    def _check(self, request: Request) -> None:
        limit, count = self.limits.max_length, len(request.prompt)
        if not count:
            raise RequestError("the prompt has no tokens", "Give at least one.")
        if count >= limit:
            raise RequestError(
                f"the prompt has {count} tokens, and the context has room for {limit}",
                "Shorten the prompt to leave room for an answer, or raise --max-length as far as the model allows.",
            )
        if count > self.limits.token_buckets[-1] and not self.scheduler.policy.chunked_prefill:
            raise RequestError(
                f"the prompt has {count} tokens, and a step has room for {self.limits.token_buckets[-1]}",
                "Leave --no-enable-chunked-prefill out, or raise --max-batch-input-tokens.",
            )
        if request.max_new_tokens is not None and request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {request.max_new_tokens}", "It must be at least 1.")
        given = [*request.prompt, *request.stop_tokens, *request.sampling.bias]
        wrong = next((token for token in given if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is not in the vocabulary", f"Ids go from 0 to {self.vocab_size - 1}.")
        if request.id in self._live:
            raise RequestError(f"a request {request.id} is in work already", "Give each request its own id.")

    def abort(self, request_id: str) -> bool:
        """Ends a request now and frees its pages; False, doing nothing, for one that has ended already."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, "aborted")
        return True

    @property
    def request_ids(self) -> Collection[str]:
        """Of the requests that wait or run."""
        return self._live.keys()

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle and self._flight is None

    @property
    def pause_s(self) -> float:
        """Seconds in which `step` would find nothing to do, although requests wait: they wait for others."""
        return self.scheduler.pause_s() if self._flight is None else 0.0

    def reset_prefix_cache(self) -> int:
        """Forgets what pages hold; returns how many pages no request used."""
        return self.scheduler.prefixes.reset() if self.scheduler.prefixes is not None else 0

    def _end(self, sequence: Generation, how: Literal["finished", "aborted", "failed"]) -> None:
        self.scheduler.finish(sequence)
        del self._live[sequence.request.id]
        self.stats.ended[how] += 1

    # --- steps ---

    def step(self) -> list[Token | Failure]:
        """Goes on by one step and returns what has become known: nothing when only part of a prompt was computed.

        With overlap, that is what the step before gave. Raises EngineLost.
        """
        results: list[Token | Failure] = []
        if self._flight is not None and self._flight.must_be_known:
            results += self._land()
        flight, failures = self._launch()
        results += failures
        if self._flight is not None:
            results += self._land()
        self._flight = flight
        if flight is not None and not self._overlaps:
            results += self._land()
        return results

    @property
    def _overlaps(self) -> bool:
        """A request that comes now has to wait for a step more: that is worth it where preparing is a part of it."""
        return self._step_seconds < _SHORT_STEP_S if self._overlap is None else self._overlap

    def _launch(self) -> tuple[Flight | None, list[Failure]]:
        """Begins the next step, where there is one; it may follow on ids that are still being computed."""
        began = time.perf_counter()
        chunks = self.scheduler.schedule()
        if not chunks:
            return None, []
        try:
            flight = self._begin(chunks, began)
        except Exception as error:
            return None, self._fail(chunks, error)
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
        for chunk in flight.sampled:
            chunk.sequence.in_flight += 1
        return flight, []

    def _begin(self, chunks: list[Chunk], began: float) -> Flight:
        before = self._flight
        places = {chunk.sequence: place for place, chunk in enumerate(before.sampled)} if before else {}
        inputs = self._writer.write(chunks, places, before.ids if before else None)
        launched = time.perf_counter()
        logits, *likeliest = self._models[inputs.graph](*inputs.arrays)
        ids = logprobs = None
        if inputs.sampled:
            rows = [_sampled_row(chunk.sequence) for chunk in inputs.sampled]
            ids = self._sampler.sample(logits, rows, *likeliest)
            if any(chunk.sequence.request.top_logprobs is not None for chunk in inputs.sampled):
                logprobs = self._sampler.logprobs(logits, ids)
        scores = prompt_scores.score(self._sampler, logits, inputs, self.limits.max_batch)
        return Flight(chunks, inputs.sampled, logits, ids, logprobs, inputs, scores, launched - began, launched)

    def _land(self) -> list[Token | Failure]:
        """Waits for the step in flight; what it gave. Requests that have ended meanwhile get nothing."""
        flight, self._flight = self._flight, None
        assert flight is not None
        results: list[Token | Failure] = []
        try:
            ids = flight.fetch_ids()
            logprobs = None if flight.logprobs is None else [part.to_numpy().tolist() for part in flight.logprobs]
            unscored = [] if flight.scores is None else prompt_scores.keep(flight.scores, flight.inputs)
        except Exception as error:
            return list(self._fail(flight.chunks, error))
        now = time.perf_counter()
        seconds, self._landed = now - max(flight.launched, self._landed), now
        self._step_seconds = seconds
        for chunk in flight.sampled:
            chunk.sequence.in_flight -= 1
        if unscored:
            results += self._fail(unscored, _NOT_A_NUMBER)
        for place, (chunk, token) in enumerate(zip(flight.sampled, ids, strict=True)):
            if not self._is_live(chunk.sequence):
                continue
            if token < 0:
                results += self._fail([chunk], _NOT_A_NUMBER)
            else:
                results.append(self._take(chunk.sequence, token, logprobs and [part[place] for part in logprobs]))
        for chunk in flight.chunks:
            if not chunk.samples and self._is_live(chunk.sequence):
                self.scheduler.keep_prefix(chunk.sequence)
        self.stats.count(flight.report(results, seconds))
        return results

    def _take(self, sequence: Generation, token: int, logprobs: list[Any] | None) -> Token:
        """Adds a token to its sequence, and ends that where it was the last."""
        sequence.tokens.append(token)
        self.scheduler.keep_prefix(sequence)
        reason = sequence.finish_reason(self.limits.max_length)
        if reason is not None:
            self._end(sequence, "finished")
        request = sequence.request
        shown = None
        if logprobs is not None and (count := request.top_logprobs) is not None:
            chosen, top_ids, top = logprobs
            shown = TokenLogprobs(chosen, top_ids[:count], top[:count])
        is_first = len(sequence.tokens) == len(request.prompt) + 1
        cached, scores = (sequence.cached_tokens or 0, sequence.scores) if is_first else (0, None)
        return Token(request.id, token, reason, shown, cached, scores if request.prompt_logprobs else None)

    def _is_live(self, sequence: Generation) -> bool:
        return self._live.get(sequence.request.id) is sequence

    def _fail(self, chunks: Sequence[Chunk], error: Exception) -> list[Failure]:
        """Ends the requests of these chunks; raises EngineLost, having ended all, when the pages are gone as well."""
        logger.error("a step failed: %s", error, exc_info=error if logger.isEnabledFor(logging.DEBUG) else None)
        try:
            self._check_state()
            sequences = [chunk.sequence for chunk in chunks if self._is_live(chunk.sequence)]
            is_lost = False
        except Exception:  # whatever it is, pages cannot be trusted that cannot be waited for
            sequences = list(self._live.values())
            is_lost = True
        failures = [Failure(sequence.request.id, _step_error(error)) for sequence in sequences]
        for sequence in sequences:
            self._end(sequence, "failed")
        if is_lost:
            raise EngineLost(failures) from error
        return failures


_NOT_A_NUMBER = MaxError(
    "the model's logits are not finite numbers",
    "Its weights or its pages are damaged, or the encoding is too narrow for it.",
)


def _step_error(error: Exception) -> MaxError:
    if isinstance(error, MaxError):
        return error
    return MaxError(f"a step failed: {type(error).__name__}: {error}", "Send the request again; the log says more.")


def _sampled_row(sequence: Generation) -> SampledRow:
    request = sequence.request
    output = sequence.output if request.sampling.has_penalties else ()
    too_early = sequence.length - len(request.prompt) < request.min_new_tokens
    banned = sorted(request.stop_tokens) if too_early and not request.ignore_eos else ()
    return SampledRow(request.id, request.sampling, request.prompt, output, sequence.length, banned)
