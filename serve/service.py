"""What all routes stand on: the engine, the text side, the configuration, the metrics, and when they can be used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from starlette.requests import Request

from .. import MaxError
from .api_error import ApiError, from_max_error, no_such_model, not_ready
from .config import ServerConfig
from .engine_port import EnginePort
from .messages import Loading, Ready, StartFailed, StepStats, StoreStats
from .metrics import Metrics
from .text_side import TextSide

_LONG_TEXT_CHARS = 8192
_TEXT_THREADS = 2


class Service:
    """A server's parts. Routes find it as `request.app.state.service`."""

    def __init__(
        self,
        port: EnginePort,
        text: TextSide | Future[TextSide],
        config: ServerConfig,
        model_name: str,
        metrics: Metrics,
    ) -> None:
        """text: or its future, while another thread still reads the files"""
        self.port, self.config, self.model_name, self.metrics = port, config, model_name, metrics
        self.created = int(time.time())
        self._text = text
        self._threads = ThreadPoolExecutor(_TEXT_THREADS, "text")
        port.on_step(self._stepped)
        port.on_store(self._stored)
        port.on_take(metrics.taken)

    def _stepped(self, step: StepStats) -> None:
        self._count_start()
        self.metrics.stepped(step)

    def _stored(self, stats: StoreStats) -> None:
        self._count_start()
        self.metrics.stored(stats)

    def _count_start(self) -> None:
        """Before anything that a worker says is counted, its start is: its totals begin at 0."""
        if self.port.ready is not None:
            self.metrics.became_ready(self.port.ready)

    def text(self) -> TextSide:
        """The text side. Raises ApiError 503 while it is being read."""
        if isinstance(self._text, TextSide):
            return self._text
        if not self._text.done():
            raise not_ready("starting", "the tokenizer is being read")
        self._text = self._text.result()
        return self._text

    def ready(self) -> Ready:
        """What the engine said when it became ready. Raises ApiError 503 while it cannot take requests."""
        ready = self.port.ready
        if self.port.state != "ready" or ready is None:
            raise not_ready(self.port.state, self.progress())
        self.metrics.became_ready(ready)
        return ready

    def progress(self) -> str:
        """What the engine does before it is ready, or why it cannot become so; empty otherwise."""
        match self.port.progress:
            case Loading(what=what, fraction=fraction) if self.port.state in ("starting", "restarting"):
                return what if fraction is None else f"{what}, {fraction:.0%}"
            case StartFailed(message=message):
                return message
        return ""

    def is_ready(self) -> bool:
        """Whether requests are answered now."""
        text_is_there = isinstance(self._text, TextSide) or self._text.done()
        return self.port.state == "ready" and text_is_there

    def has_chat(self) -> bool:
        """Whether the model has a chat template, as far as is known yet."""
        return self.is_ready() and self.text().template is not None

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not served; None stands for the one that is."""
        if name is not None and name != self.model_name:
            raise no_such_model(name, self.model_name)

    def tokens_of(self, prompt: str, param: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a prompt. Raises ApiError for one that is too long, cutting none that is so in any case."""
        tokenizer, ready = self.text().tokenizer, self.port.ready
        if len(prompt) > _LONG_TEXT_CHARS and ready is not None:
            least = tokenizer.least_tokens(prompt)
            if least >= ready.max_length:
                raise too_long(f"at least {least}", ready.max_length, param)
        return tokenizer.encode(prompt, add_special_tokens)

    async def in_thread[T](self, work: Callable[[], T], size_chars: int, param: str | None) -> T:
        """Runs work on text, a long one beside the event loop. Errors of the user name the field `param`."""
        started = time.perf_counter()
        try:
            if size_chars <= _LONG_TEXT_CHARS:
                return work()
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except MaxError as error:
            raise from_max_error(error, param) from error
        finally:
            self.metrics.processed_input(time.perf_counter() - started)


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    return request.app.state.service


def too_long(tokens: int | str, max_length: int, param: str) -> ApiError:
    """400 for a prompt that leaves no room for an answer."""
    return ApiError(
        400,
        f"Prompt is too long: {tokens} tokens leave no room for an answer in the maximum context length of "
        f"{max_length} tokens. Please shorten your prompt.",
        code="context_length_exceeded",
        param=param,
    )
