"""The start of an engine worker: prepares and loads on a thread of its own, and keeps the latest news of it."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

from .. import MaxError
from ..cache.counters import Counters
from ..runtime.checkpoint import Checkpoint
from ..runtime.engine import Engine
from ..runtime.model import Executables
from ..runtime.preparation_report import Prepared
from ..runtime.text_engine import Started, start
from .messages import Loading, Ready, StartFailed
from .pipeline import preparation_of
from .text_side import TextSide
from .worker_config import WorkerConfig

logger = logging.getLogger(__name__)


class WorkerStart:
    """Begins when it is made."""

    def __init__(self, config: WorkerConfig) -> None:
        self.news: Loading | Ready | StartFailed = Loading("reading the checkpoint")
        """What was said last; Ready or StartFailed once `is_over`."""
        self._config = config
        self._spawn_seconds = time.time() - config.spawned
        self._started: Started | None = None
        self._counters: Counters | None = None
        self._thread = threading.Thread(target=self._run, name="start", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def engine(self) -> Engine:
        """The engine, once it is ready."""
        assert self._started is not None, "asked for before the start was over, or after it has failed"
        return self._started.engine

    @property
    def executables(self) -> Executables:
        """Those that are loaded, more and more of them."""
        assert self._started is not None, "asked for before the start was over, or after it has failed"
        return self._started.executables

    @property
    def counters(self) -> Counters:
        """What is done with the store, as it grows."""
        assert self._counters is not None, "asked for before the start was over, or after it has failed"
        return self._counters

    def load_rest(self) -> None:
        """Loads what no request has needed yet, beside the work on requests; damage is told when it is needed."""
        assert self._started is not None
        try:
            self._started.load_rest()
        except MaxError as error:
            logger.warning("an executable cannot be loaded: %s", error)

    def _run(self) -> None:
        try:
            self.news = self._start()
        except MaxError as error:
            logger.debug("the start failed", exc_info=True)
            self.news = StartFailed(error.kind, error.message, error.hint)
        except Exception as error:
            logger.debug("the start failed", exc_info=True)
            hint = "This is a fault of max; `--log-level debug` shows where."
            self.news = StartFailed("internal", f"internal error: {type(error).__name__}: {error}", hint)

    def _start(self) -> Ready:
        config, began = self._config, time.perf_counter()
        model = config.pipeline.model
        checkpoint = Checkpoint.open(config.folder, model.weight_path, model.rope_order, config.pipeline.cache)
        text = partial(TextSide.load, config.folder, weight_path=model.weight_path, cache=config.pipeline.cache)
        preparation = preparation_of(config.pipeline, checkpoint, text, self._progress, keep_weights=True)

        def prepare() -> Prepared:
            prepared = preparation.run()
            self.news = Loading("loading code and weights")
            return prepared

        self._started = started = start(
            prepare,
            preparation.store,
            scheduling=config.scheduling,
            max_waiting=config.queue.max_waiting,
            use=config.pipeline.device_use,
        )
        self._counters = counters = preparation.store.counters
        total = time.perf_counter() - began
        compile_seconds = started.report.seconds.get("compile", 0.0)
        seconds = {
            "spawn": self._spawn_seconds,
            "build": total - started.load_seconds - compile_seconds,
            "compile": compile_seconds,
            "init": started.load_seconds,
            "total": self._spawn_seconds + total,
        }
        return self._ready(checkpoint, started, seconds, counters)

    def _progress(self, phase: str, item: str, done: int, total: int) -> None:
        self.news = Loading(f"{phase} {item}".strip(), done / total if total else None)

    def _ready(self, checkpoint: Checkpoint, started: Started, seconds: dict[str, float], counters: Counters) -> Ready:
        limits, report = started.engine.limits, started.report
        return Ready(
            max_length=limits.max_length,
            vocab_size=started.engine.vocab_size,
            max_batch_size=limits.max_batch,
            page_tokens=limits.page_tokens,
            num_pages=limits.num_pages - 1,
            encoding=self._config.pipeline.model.quantization_encoding or checkpoint.encoding,
            device=started.prepared.compiled.target,
            artifact=str(started.prepared.artifact_file or ""),
            artifact_source=f"{'compiled' if report.compiled else 'cache'}: {report.reason}",
            seconds=seconds,
            cache=counters.to_json(),
        )
