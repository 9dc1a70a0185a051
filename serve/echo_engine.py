"""An engine without a model, which answers with the tokens of the prompt: for tests, and to time what is around one.

    python -m max.serve.echo_engine FOLDER [PORT [SECONDS_PER_TOKEN]]

serves the tokenizer and template of a checkpoint's folder over it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from .. import CapacityError
from .engine_port import State
from .messages import Loading, Logprobs, Ready, StartFailed, StepStats, StoreStats, Submit, Tokens

VOCAB_SIZE = 8192
MAX_LENGTH = 1024
_PAGE_TOKENS = 16


class EchoEngine:
    """An EnginePort. Token k of an answer is token (k + seed) of the prompt, in a circle; greedy means seed 0."""

    def __init__(self, *, token_s: float = 0.0, max_running: int | None = None) -> None:
        """token_s: seconds between tokens; max_running: requests at once, above which there is no capacity"""
        self._token_s, self._max_running = token_s, max_running
        self._listeners: list[Callable[[StepStats], None]] = []
        self._take_listeners: list[Callable[[int, float, int], None]] = []
        self.state: State = "ready"
        self.ready: Ready | None = Ready(
            MAX_LENGTH, VOCAB_SIZE, 64, _PAGE_TOKENS, 1024, "none", "none", "", "cache (an echo has no code)"
        )
        self.progress: Loading | StartFailed | None = None
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self._prompts: set[tuple[str, tuple[int, ...]]] = set()
        self._total_cached = 0

    async def generate(self, request: Submit) -> AsyncIterator[list[Tokens]]:
        if self._max_running is not None and len(self.running) >= self._max_running:
            raise CapacityError("the queue is full", "Send the request again in a moment.")
        self.running.add(request.id)
        is_complete = False
        try:
            for message in self._tokens(request):
                await asyncio.sleep(self._token_s)
                is_complete = message.finish_reason is not None
                self._count(message)
                for listener in self._take_listeners:
                    listener(1, 0.0, 0)
                yield [message]
        finally:
            self.running.discard(request.id)
            if not is_complete:
                self.aborted.append(request.id)

    def _tokens(self, request: Submit) -> Iterator[Tokens]:
        prompt, sampling = request.prompt_ids, request.sampling
        offset = sampling.seed if sampling.temperature > 0 else 0
        limit = MAX_LENGTH - len(prompt)
        limit = limit if request.max_new_tokens is None else min(limit, request.max_new_tokens)
        cached = self._cached(request)
        stops = [] if request.ignore_eos else request.stop_token_ids
        for number in range(limit):
            token = prompt[(number + offset) % len(prompt)]
            is_stop = token in stops and number >= request.min_new_tokens
            reason = "stop" if is_stop else "length" if number + 1 == limit else None
            logprobs = None if request.top_logprobs is None else [_logprobs(token, request.top_logprobs)]
            scores = None
            if request.prompt_logprobs and number == 0:
                scores = [_logprobs(each, request.top_logprobs or 0) for each in prompt[1:]]
            yield Tokens(request.id, [token], logprobs, reason, cached if number == 0 else 0, scores)
            if reason is not None:
                return

    def _cached(self, request: Submit) -> int:
        """Tokens that a prefix cache would have found: all of an equal prompt but those of its last page."""
        key = (request.cache_salt, tuple(request.prompt_ids))
        was_seen = key in self._prompts
        self._prompts.add(key)
        return (len(request.prompt_ids) - 1) // _PAGE_TOKENS * _PAGE_TOKENS if was_seen else 0

    def _count(self, message: Tokens) -> None:
        running = len(self.running)
        self._total_cached += message.cached_tokens
        step = StepStats(
            batch_type="TG",
            batch_size=running,
            input_tokens=running,
            new_tokens=len(message.token_ids),
            context_tokens=running,
            queued=0,
            running=running,
            execution_s=0.001,
            creation_s=0.0,
            terminated=0,
            used_pages=running,
            num_pages=1024,
            total_preempted=0,
            total_cache_hit_tokens=self._total_cached,
            total_cache_miss_tokens=0,
            total_cache_hit_pages=self._total_cached // _PAGE_TOKENS,
        )
        for listener in self._listeners:
            listener(step)

    async def reset_prefix_cache(self) -> int:
        pages = len(self._prompts)
        self._prompts.clear()
        return pages

    def on_step(self, listener: Callable[[StepStats], None]) -> None:
        self._listeners.append(listener)

    def on_store(self, listener: Callable[[StoreStats], None]) -> None:
        """Never calls it: there is no store."""

    def on_take(self, listener: Callable[[int, float, int], None]) -> None:
        self._take_listeners.append(listener)

    def refuse(self) -> None:
        self.state = "draining"

    async def failed(self) -> StartFailed:
        return await asyncio.get_running_loop().create_future()

    async def drain(self, seconds: float) -> None:
        self.refuse()
        deadline = asyncio.get_running_loop().time() + seconds
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)


def _logprobs(token: int, top: int) -> Logprobs:
    """The token at -0.5, and behind it its neighbours, each half as likely as the one before."""
    ids = [(token + place) % VOCAB_SIZE for place in range(top)]
    return Logprobs(-0.5, ids, [-0.5 - 0.69 * place for place in range(top)])


def main(folder: str, port: str = "8000", token_s: str = "0") -> None:
    """Serves an echo until a signal comes."""
    import uvloop

    from .api_process import ApiProcess
    from .config import ServerConfig
    from .listener import bind, url_of
    from .metrics import Metrics
    from .text_side import TextSide

    text: Future[TextSide] = Future()
    text.set_result(TextSide.load(Path(folder)))
    listener = bind("127.0.0.1", int(port), "PORT")
    print(url_of(listener), flush=True)
    uvloop.run(
        ApiProcess(ServerConfig(), "echo", text, listener, Metrics("echo")).run(EchoEngine(token_s=float(token_s)))
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
