"""The engine loop: schedule, run, postprocess. One thread calls it; every request ends in exactly one way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .. import CapacityError, MaxError, RequestError
from ..compiler import xla
from ..compiler.limits import Limits
from .model import Buffer, Model
from .request import FinishReason, Generation, Request
from .sampling import SampledRow, Sampler
from .scheduler import Chunk, Scheduler
from .step_inputs import StepInputs, make_inputs


@dataclass(frozen=True)
class Token:
    """One new token of a request; `finish_reason` is set on the last."""

    request_id: str
    id: int
    finish_reason: FinishReason | None


class StepFailed(MaxError):
    """A step went wrong: its requests, `request_ids`, have ended as failed. Message and hint are those of the cause.

    is_sound: whether the pages survived, so that the engine can go on with the others
    """

    def __init__(self, request_ids: Sequence[str], cause: Exception, is_sound: bool) -> None:
        known = cause if isinstance(cause, MaxError) else None
        message = known.message if known else f"the step failed: {type(cause).__name__}: {cause}"
        super().__init__(message, known.hint if known else "Send the request again; the log of the engine says more.")
        self.request_ids, self.is_sound = list(request_ids), is_sound


@dataclass(frozen=True)
class StepReport:
    """What one step was; seconds on the clock.

    context_tokens: tokens in the pages of the requests in the step, this step's among them
    """

    is_prefill: bool
    batch_size: int
    input_tokens: int
    context_tokens: int
    creation_seconds: float
    execution_seconds: float
    terminated: int


@dataclass
class EngineStats:
    """Counts since the start. A step that computes any token of a prompt counts as prefill."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    last_step: StepReport | None = None

    def take_last_step(self) -> StepReport | None:
        """The report of the last step, once."""
        report, self.last_step = self.last_step, None
        return report


class Engine:
    """Runs requests over the step and sampler models of a text pipeline."""

    def __init__(
        self,
        models: dict[str, Model],
        limits: Limits,
        vocab_size: int,
        *,
        max_waiting: int | None = None,
        check_state: Callable[[], None] = lambda: None,
    ) -> None:
        """max_waiting: requests that may wait for a row, None for any number
        check_state: raises when the models' pages were lost in a call that failed"""
        self.limits, self.vocab_size, self.max_waiting = limits, vocab_size, max_waiting
        self.scheduler = Scheduler(limits)
        self.stats = EngineStats()
        self._models, self._check_state = models, check_state
        self._sampler = Sampler(models, vocab_size, limits.max_batch)
        self._live: dict[str, Generation] = {}

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises RequestError for one that can never be answered and CapacityError when too many wait already; both count
        as rejected.
        """
        try:
            self._check(request)
            if self.max_waiting is not None and self.scheduler.num_waiting >= self.max_waiting:
                raise CapacityError(f"{self.scheduler.num_waiting} requests wait already", "Try again later.")
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

    def step(self) -> list[Token]:
        """Computes the next step and returns the tokens that it gave; an empty list when only part of a prompt was.

        Raises StepFailed, and has ended the step's requests by then.
        """
        started = time.perf_counter()
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        try:
            inputs = make_inputs(chunks, self.limits)
            launched = time.perf_counter()
            logits = self._models[inputs.graph](*inputs.arrays)[0]
            ids = self._sample(inputs, logits)
        except Exception as error:
            raise self._failed(chunks, error) from error
        ended = time.perf_counter()
        tokens = self._postprocess(chunks, inputs.sampled, ids)
        self._count(chunks, tokens, launched - started, ended - launched)
        return tokens

    def _failed(self, chunks: Sequence[Chunk], error: Exception) -> StepFailed:
        for chunk in chunks:
            self._end(chunk.sequence, "failed")
        try:
            self._check_state()
            is_sound = True
        except Exception:  # whatever it is, pages cannot be trusted that cannot be waited for
            is_sound = False
        return StepFailed([chunk.sequence.request.id for chunk in chunks], error, is_sound)

    def _end(self, sequence: Generation, how: str) -> None:
        self.scheduler.finish(sequence)
        del self._live[sequence.request.id]
        self.stats.ended[how] += 1

    def _sample(self, inputs: StepInputs, logits: Buffer) -> list[int]:
        if not inputs.sampled:
            xla.wait([logits.array])
            return []
        rows = [_sampled_row(chunk.sequence) for chunk in inputs.sampled]
        return self._sampler.sample(logits, rows).to_numpy()[: len(rows)].tolist()

    def _postprocess(self, chunks: Sequence[Chunk], sampled: Sequence[Chunk], ids: Sequence[int]) -> list[Token]:
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
        tokens = []
        for chunk, token in zip(sampled, ids, strict=True):
            sequence = chunk.sequence
            sequence.tokens.append(token)
            reason = sequence.finish_reason(self.limits.max_length)
            tokens.append(Token(sequence.request.id, token, reason))
            if reason is not None:
                self._end(sequence, "finished")
        return tokens

    def _count(self, chunks: Sequence[Chunk], tokens: Sequence[Token], creation: float, execution: float) -> None:
        stats = self.stats
        stats.steps += 1
        report = StepReport(
            is_prefill=any(chunk.start < len(chunk.sequence.request.prompt) for chunk in chunks),
            batch_size=len(chunks),
            input_tokens=sum(chunk.count for chunk in chunks),
            context_tokens=sum(chunk.start + chunk.count for chunk in chunks),
            creation_seconds=creation,
            execution_seconds=execution,
            terminated=sum(token.finish_reason is not None for token in tokens),
        )
        stats.last_step = report
        if report.is_prefill:
            stats.prefill_tokens += report.input_tokens
            stats.prefill_seconds += creation + execution
        else:
            stats.decode_tokens += report.input_tokens
            stats.decode_seconds += creation + execution

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle


def _sampled_row(sequence: Generation) -> SampledRow:
    request = sequence.request
    output = sequence.output
    too_early = len(output) < request.min_new_tokens
    banned = sorted(request.stop_tokens) if too_early and not request.ignore_eos else ()
    return SampledRow(request.id, request.sampling, request.prompt, output, len(sequence.tokens), banned)
