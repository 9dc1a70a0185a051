"""Counts and times of a server, kept in prometheus_client and answered at /metrics. Nothing is sent anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.responses import Response

from ..cache.counters import Counters
from .messages import Ready, StepStats, StoreStats
from .metric_table import ROWS, MetricRow

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder that several API processes share; prometheus_client reads it when it is first imported."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# The time of creation beside each sample doubles the exposition and is read by nobody.
prometheus_client.disable_created_metrics()


class Metrics:
    """Every metric of the table. One per API process."""

    def __init__(self, model: str = "", *, records_steps: bool = True) -> None:
        """records_steps: whether this process counts the engine's steps and starts; one of several does"""
        self._registry = CollectorRegistry()
        self._families = {row.name.removeprefix("maxserve."): _family(row, self._registry) for row in ROWS}
        self._model, self._records_steps = model, records_steps
        self._totals: dict[tuple[str, ...], float] = {}
        self._awaiting = 0
        self._shown_ready: Ready | None = None
        # Those that are touched for every token.
        self._itl, self._ttft = self["itl"], self["time_to_first_token"]
        self._buffered, self._num_buffered = self["responses_buffered"], self["num_responses_buffered"]
        self._queue_time = self["response_queue_time"]
        if MULTIPROCESS_VARIABLE not in os.environ:
            ProcessCollector(registry=self._registry)

    def __getitem__(self, name: str) -> Any:
        """The prometheus_client object of a row, by its name without `maxserve.`."""
        return self._families[name]

    def exposition(self) -> bytes:
        """All values in the text format, those of all API processes where there are several."""
        if MULTIPROCESS_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)

    def response(self) -> Response:
        """The answer to GET /metrics."""
        return Response(self.exposition(), headers={"content-type": CONTENT_TYPE})

    def request_ended(self, path: str, code: int, seconds: float) -> None:
        """An HTTP request has been answered. path: the route's pattern, so that clients cannot make up labels"""
        self["request_count"].labels(str(code), path).inc()
        self["request_time"].labels(path).observe(seconds * 1e3)

    def arrived(self) -> None:
        """A request for an answer is accepted; `admitted` or `refused` follows."""
        self._awaiting += 1
        self["num_requests_awaiting_admission"].inc()
        self["requests_awaiting_admission"].observe(self._awaiting)

    def handed_over(self) -> None:
        """It went to the engine, or was refused."""
        self._awaiting -= 1
        self["num_requests_awaiting_admission"].dec()

    def processed_input(self, seconds: float) -> None:
        """Templates and tokenization of a request took so long."""
        self["input_processing_time"].observe(seconds * 1e3)

    def taken(self, messages: int, seconds: float, left: int) -> None:
        """The streaming side took messages of the engine, the oldest of which had waited so long; others are left."""
        self._num_buffered.set(left)
        self._buffered.observe(messages + left)
        self._queue_time.observe(seconds * 1e3)

    def timer(self, arrived: float) -> AnswerTimer:
        """The times of one answer; arrived: by perf_counter"""
        return AnswerTimer(self, arrived)

    def became_ready(self, ready: Ready) -> None:
        """The engine worker has started, and said where its executables came from; its totals begin anew."""
        if not self._records_steps or ready is self._shown_ready:
            return
        self._shown_ready = ready
        self._totals.clear()
        self["pipeline_load"].labels(self._model).inc()
        self._count_store(ready.cache)
        for component, seconds in ready.seconds.items():
            self["model_load_time"].labels(component).observe(seconds * 1e3)
        self["cache.num_total_blocks"].set(ready.num_pages)

    def stepped(self, step: StepStats) -> None:
        """The engine has made a step."""
        if not self._records_steps:
            return
        kind = step.batch_type
        for name, value in (
            ("batch_size", step.batch_size),
            ("batch_input_tokens", step.input_tokens),
            ("batch_context_tokens", step.context_tokens),
            ("batch_creation_time", step.creation_s * 1e3),
            ("batch_execution_time", step.execution_s * 1e3),
            ("batch_pending_reqs", step.queued),
            ("batch_terminated_reqs", step.terminated),
        ):
            self[name].labels(kind).observe(value)
        if step.execution_s > 0:
            name = "batch_prompt_throughput" if kind == "CE" else "batch_generation_throughput"
            self[name].labels(kind).observe(step.input_tokens / step.execution_s)
        self["num_requests_queued"].set(step.queued)
        self["num_requests_running"].set(step.running - step.terminated)
        self["cache.num_used_blocks"].set(step.used_pages)
        self["cache.num_total_blocks"].set(step.num_pages)
        self["cache.used_kv_pct"].observe(100 * step.used_pages / max(1, step.num_pages))
        self._add_up("cache.hits", step.total_cache_hit_tokens, "g0")
        self._add_up("cache.misses", step.total_cache_miss_tokens)
        self._add_up("cache.device_blocks_served", step.total_cache_hit_pages)
        self._add_up("cache.preemption_count", step.total_preempted)

    def stored(self, stats: StoreStats) -> None:
        """The engine worker has done something with its store, or loaded executables from an artifact."""
        if not self._records_steps:
            return
        self._count_store(stats.cache)
        self._add_up("executables_loaded", stats.executables)

    def _count_store(self, counters: dict[str, Any]) -> None:
        for sample in Counters.from_json(counters).samples() if counters else ():
            name = sample.name.replace("executable_cache_", "executable_cache.")
            self._add_up(name, sample.value, *sample.labels.values())

    def _add_up(self, name: str, total: float, *labels: str) -> None:
        """Counts on from the worker's own total, which grows from 0 between one `became_ready` and the next."""
        before = self._totals.get((name, *labels), 0)
        self._totals[name, *labels] = total
        counter = self[name].labels(*labels) if labels else self[name]
        counter.inc(total - before)


class AnswerTimer:
    """The times of one answer."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics, self._arrived = metrics, arrived
        self._started = perf_counter()
        self._first = self._last = 0.0

    def tokens(self, count: int) -> None:
        """So many new tokens are there."""
        if not count:
            return
        now = perf_counter()
        if not self._first:
            self._first = now
            self._metrics._ttft.observe((now - self._arrived) * 1e3)
        else:
            self._metrics._itl.observe((now - self._last) * 1e3 / count)
        self._last = now

    def end(self, prompt_tokens: int, new_tokens: int, cached_tokens: int) -> None:
        """The answer has ended, one way or another."""
        metrics = self._metrics
        if not new_tokens:
            return
        metrics["num_input_tokens"].inc(prompt_tokens)
        metrics["num_output_tokens"].inc(new_tokens)
        metrics["output_processing_time"].observe((perf_counter() - self._started) * 1e3)
        metrics["input_tokens_per_request"].observe(prompt_tokens)
        metrics["output_tokens_per_request"].observe(new_tokens)
        metrics["cache.request_prefix_coverage"].observe(100 * cached_tokens / max(1, prompt_tokens))
        if new_tokens > 1:
            metrics["time_per_output_token"].observe((self._last - self._first) * 1e3 / (new_tokens - 1))


def forget_process(pid: int) -> None:
    """Takes the gauges of an API process that has ended out of the sums; its counts stay."""
    if folder := os.environ.get(MULTIPROCESS_VARIABLE):
        mark_process_dead(pid, str(Path(folder)))


def _family(row: MetricRow, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if row.kind == "histogram":
        return Histogram(row.exposed, row.meaning, row.labels, registry=registry, buckets=row.buckets)
    if row.kind == "gauge":
        return Gauge(row.exposed, row.meaning, row.labels, registry=registry, multiprocess_mode="livesum")
    return Counter(row.exposed, row.meaning, row.labels, registry=registry)
