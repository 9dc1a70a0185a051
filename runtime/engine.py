"""The engine loop: schedule, run, postprocess. One thread calls it; every request ends in exactly one way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .. import RequestError
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


@dataclass
class EngineStats:
    """Counts since the start. A step that computes any token of a prompt counts as prefill."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0
    ended: Counter[str] = field(default_factory=Counter)


class Engine:
    """Runs requests over the step and sampler models of a text pipeline."""

    def __init__(self, models: dict[str, Model], limits: Limits, vocab_size: int) -> None:
        self.limits, self.vocab_size = limits, vocab_size
        self.scheduler = Scheduler(limits)
        self.stats = EngineStats()
        self._models = models
        self._sampler = Sampler(models, vocab_size)
        self._live: dict[str, Generation] = {}

    def add(self, request: Request) -> None:
        """Queues a request; raises RequestError for one that can never be answered, and counts it as rejected."""
        try:
            self._check(request)
        except RequestError:
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

    def abort(self, request_id: str) -> None:
        """Ends a request now and frees its pages; one that has ended already is left alone."""
        sequence = self._live.pop(request_id, None)
        if sequence is not None:
            self.scheduler.finish(sequence)
            self.stats.ended["aborted"] += 1

    def step(self) -> list[Token]:
        """Computes the next step and returns the tokens that it gave; an empty list when only part of a prompt was."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        started = time.perf_counter()
        inputs = make_inputs(chunks, self.limits)
        logits = self._models[inputs.graph](*inputs.arrays)[0]
        ids = self._sample(inputs, logits)
        tokens = self._postprocess(chunks, inputs.sampled, ids)
        self._count(chunks, time.perf_counter() - started)
        return tokens

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
                self.scheduler.finish(sequence)
                del self._live[sequence.request.id]
                self.stats.ended["finished"] += 1
        return tokens

    def _count(self, chunks: Sequence[Chunk], seconds: float) -> None:
        stats = self.stats
        stats.steps += 1
        count = sum(chunk.count for chunk in chunks)
        if any(chunk.start < len(chunk.sequence.request.prompt) for chunk in chunks):
            stats.prefill_tokens += count
            stats.prefill_seconds += seconds
        else:
            stats.decode_tokens += count
            stats.decode_seconds += seconds

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle


def _sampled_row(sequence: Generation) -> SampledRow:
    request = sequence.request
    output = sequence.output
    too_early = len(output) < request.min_new_tokens
    banned = sorted(request.stop_tokens) if too_early and not request.ignore_eos else ()
    return SampledRow(request.sampling, request.prompt, output, len(sequence.tokens), banned)
