"""One answer of the engine as text: deltas as tokens come, cut at a stop, with counts and times for the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter

from .. import MaxError
from .detokenize import TextStream
from .engine_port import EnginePort
from .messages import Logprobs, Submit, Tokens
from .metrics import Metrics
from .text_output import CompletionText, FinishReason, StopRules
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token of an answer with its log-probabilities; `offset` is where its text begins in the answer."""

    id: int
    offset: int
    logprobs: Logprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in the answer number `index`. Tokens are recorded where log-probabilities were asked for."""

    index: int
    text: str
    finish_reason: FinishReason | None
    tokens: Sequence[TokenRecord] = ()


class _CountedStream:
    """A text stream that knows how many characters it has given."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self.chars = 0

    def push(self, token_id: int) -> str:
        text = self._stream.push(token_id)
        self.chars += len(text)
        return text

    def flush(self) -> str:
        return self._stream.flush()


@dataclass
class Answer:
    """One answer in the making. `deltas` may be called once; the counts are complete when it has ended."""

    index: int
    request: Submit
    rules: StopRules
    tokenizer: Tokenizer
    metrics: Metrics
    arrived: float = field(default_factory=perf_counter)
    """When the HTTP request came in, by perf_counter."""
    new_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[Logprobs] | None = None
    """Of the prompt's tokens behind the first, where asked for; there before the first delta."""

    async def deltas(self, port: EnginePort) -> AsyncGenerator[Delta]:
        """The answer piece by piece, the last with its finish reason. Raises MaxError when the engine ends it.

        Closing the iterator early aborts the request.
        """
        stream = _CountedStream(self.tokenizer.stream())
        completion = CompletionText(stream, self.rules)
        timer = self.metrics.timer(self.arrived)
        try:
            async with aclosing(_closable(port.generate(self.request))) as batches:
                async for batch in batches:
                    delta = self._take(batch, completion, stream)
                    timer.tokens(completion.num_tokens - self.new_tokens)
                    self.new_tokens = completion.num_tokens
                    if delta.text or delta.tokens or delta.finish_reason:
                        yield delta
                    if delta.finish_reason is not None:
                        return
        finally:
            timer.end(len(self.request.prompt_ids), self.new_tokens, self.cached_tokens)
        raise MaxError("the engine ended an answer without saying why", "This is a fault of max.")

    def _take(self, batch: Sequence[Tokens], completion: CompletionText, stream: _CountedStream) -> Delta:
        text, records = "", []
        for message in batch:
            self.cached_tokens = max(self.cached_tokens, message.cached_tokens)
            logprobs = message.logprobs
            if message.prompt_logprobs is not None:
                self.prompt_logprobs = message.prompt_logprobs
            if self.request.prompt_logprobs and self.prompt_logprobs is None:
                raise MaxError("the engine gave no log probabilities of the prompt", "This is a fault of max.")
            if logprobs is None and self.request.top_logprobs is not None and message.token_ids:
                raise MaxError("the engine gave no log probabilities", "This is a fault of max.")
            for place, token_id in enumerate(message.token_ids):
                offset, before = stream.chars, completion.finish_reason
                delta = completion.push(token_id)
                text += delta.text
                is_shown = before is None and not (
                    delta.finish_reason == "stop" and token_id in self.rules.ending_token_ids
                )
                if logprobs is not None and is_shown:
                    records.append(TokenRecord(token_id, offset, logprobs[place]))
            if message.finish_reason is not None and completion.finish_reason is None:
                text += completion.finish(message.finish_reason).text
        return Delta(self.index, text, completion.finish_reason, records)


def _closable(tokens: AsyncIterator[list[Tokens]]) -> AsyncGenerator[list[Tokens]]:
    """The port's iterator as what it is: it promises that closing it aborts the request."""
    assert isinstance(tokens, AsyncGenerator), "EnginePort.generate returns an asynchronous generator"
    return tokens


async def merged(answers: Sequence[Answer], port: EnginePort) -> AsyncGenerator[Delta]:
    """The deltas of several answers as they come. The first that fails ends all; so does closing the iterator."""
    if len(answers) == 1:
        async with aclosing(answers[0].deltas(port)) as deltas:
            async for delta in deltas:
                yield delta
        return
    ready: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    async def run(answer: Answer) -> None:
        try:
            async with aclosing(answer.deltas(port)) as deltas:
                async for delta in deltas:
                    ready.put_nowait(delta)
        except Exception as error:  # handed to the reader, which raises it
            ready.put_nowait(error)
        else:
            ready.put_nowait(None)

    tasks = [asyncio.create_task(run(answer)) for answer in answers]
    try:
        unfinished = len(tasks)
        while unfinished:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class WholeAnswer:
    """An answer that is complete."""

    text: str = ""
    finish_reason: FinishReason = "stop"
    tokens: list[TokenRecord] = field(default_factory=list)


async def collected(answers: Sequence[Answer], port: EnginePort) -> list[WholeAnswer]:
    """All answers, complete, in the order of their indices. Raises MaxError when one fails."""
    whole = {answer.index: WholeAnswer() for answer in answers}
    async with aclosing(merged(answers, port)) as deltas:
        async for delta in deltas:
            one = whole[delta.index]
            one.text += delta.text
            one.tokens += delta.tokens
            if delta.finish_reason is not None:
                one.finish_reason = delta.finish_reason
    return [whole[index] for index in sorted(whole)]
