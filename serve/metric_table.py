"""The metrics of a server as data: name, kind, unit, labels, meaning. docs/metrics.md is written from this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000)
_FINE_MS = (0.05, 0.1, 0.2, 0.5, *_MS[:12])
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 65_536)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PERCENT = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)
_RATES = (1, 5, 10, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class MetricRow:
    """One metric. `name` is the dotted name; /metrics shows it with underscores and the unit behind it."""

    name: str
    kind: Kind
    meaning: str
    unit: str = ""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exposed(self) -> str:
        """The name of the family in the text exposition, without a counter's `_total`."""
        base = self.name.replace(".", "_")
        return f"{base}_{self.unit}" if self.unit else base


def _histogram(name: str, meaning: str, unit: str, buckets: tuple[float, ...], *labels: str) -> MetricRow:
    return MetricRow(f"maxserve.{name}", "histogram", meaning, unit, labels, buckets)


def _counter(name: str, meaning: str, unit: str = "", *labels: str) -> MetricRow:
    return MetricRow(f"maxserve.{name}", "counter", meaning, unit, labels)


def _gauge(name: str, meaning: str) -> MetricRow:
    return MetricRow(f"maxserve.{name}", "gauge", meaning)


_REQUESTS = (
    _counter("request_count", "HTTP requests answered, by status and route", "", "code", "path"),
    _histogram("request_time", "From a request's arrival to the end of its answer", "milliseconds", _MS, "path"),
    _counter("num_input_tokens", "Prompt tokens of all answers"),
    _counter("num_output_tokens", "Tokens generated for all answers"),
    _histogram("input_tokens_per_request", "Prompt tokens of an answer", "tokens", _TOKENS),
    _histogram("output_tokens_per_request", "Tokens generated for an answer", "tokens", _TOKENS),
    _histogram("time_to_first_token", "From a request's arrival to its first token", "milliseconds", _MS),
    _histogram("itl", "Time between tokens of an answer, as they reach the API process", "milliseconds", _FINE_MS),
    _histogram(
        "time_per_output_token",
        "Decode time of an answer per token behind the first; once per answer",
        "milliseconds",
        _FINE_MS,
    ),
    _histogram("input_processing_time", "Templates and tokenization of a request", "milliseconds", _FINE_MS),
    _histogram(
        "output_processing_time",
        "From the end of input processing to the end of an answer, as its reader takes it; once per answer",
        "milliseconds",
        _MS,
    ),
)
_BACKLOG = (
    _gauge("num_requests_awaiting_admission", "Requests accepted and not yet handed to the engine worker"),
    _histogram("requests_awaiting_admission", "The same, seen by each request as it arrives", "", _COUNTS),
    _gauge("num_requests_queued", "Requests waiting in the engine's queue"),
    _gauge("num_requests_running", "Requests in the engine's batch"),
    _gauge("num_responses_buffered", "Messages of the engine that have not been streamed to their clients"),
    _histogram("responses_buffered", "The same, seen whenever the streaming side takes some", "", _COUNTS),
    _histogram(
        "response_queue_time",
        "How long the oldest of them had been waiting in the API process",
        "milliseconds",
        _FINE_MS,
    ),
)
_BATCHES = (
    _histogram(
        "batch_size", "Requests in a step; CE steps hold prompt tokens, TG steps do not", "", _COUNTS, "batch_type"
    ),
    _histogram("batch_input_tokens", "Tokens computed in a step", "", _TOKENS, "batch_type"),
    _histogram(
        "batch_context_tokens", "Tokens that the requests of a step have in their pages", "", _TOKENS, "batch_type"
    ),
    _histogram("batch_creation_time", "Scheduling of a step", "milliseconds", _FINE_MS, "batch_type"),
    _histogram("batch_execution_time", "Execution of a step", "milliseconds", _FINE_MS, "batch_type"),
    _histogram(
        "batch_prompt_throughput", "Prompt tokens per second of a CE step", "tokens_per_second", _RATES, "batch_type"
    ),
    _histogram(
        "batch_generation_throughput", "Tokens per second of a TG step", "tokens_per_second", _RATES, "batch_type"
    ),
    _histogram("batch_pending_reqs", "Requests left waiting beside a step", "", _COUNTS, "batch_type"),
    _histogram("batch_terminated_reqs", "Requests that ended with a step", "", _COUNTS, "batch_type"),
)
_PAGES = (
    _gauge("cache.num_used_blocks", "Pages of keys and values in use"),
    _gauge("cache.num_total_blocks", "Pages of keys and values there are"),
    _histogram("cache.used_kv_pct", "Share of the pages in use, at each step", "percent", _PERCENT),
    _counter("cache.hits", "Prompt tokens found in the prefix cache", "tokens", "tier"),
    _counter("cache.misses", "Prompt tokens not found there", "tokens"),
    _counter("cache.device_blocks_served", "Pages that requests took from the prefix cache", "blocks"),
    _histogram("cache.request_prefix_coverage", "Share of a prompt found in the prefix cache", "percent", _PERCENT),
    _counter("cache.preemption_count", "Requests whose pages were taken for others, to be computed again"),
)
_START = (
    _histogram(
        "model_load_time",
        "Start of the engine worker, by phase; `total` is all of it",
        "milliseconds",
        _MS,
        "component",
    ),
    _counter("pipeline_load", "Starts of the engine worker", "", "model"),
    _counter("executables_loaded", "Executables loaded from the artifact: some at the start, some only when needed"),
)
_CACHE = (
    _counter("executable_cache.hits", "Artifacts found, by how they were come by", "", "kind"),
    _counter("executable_cache.misses", "Artifacts that were not found, by reason", "", "reason"),
    _counter("executable_cache.made", "Artifacts made, by what they were made from", "", "source"),
    _counter("executable_cache.quarantined", "Entries set aside as damaged"),
    _counter("executable_cache.evicted", "Files removed to stay within bounds"),
    _counter("executable_cache.bytes_read", "Bytes of artifacts found"),
    _counter("executable_cache.bytes_written", "Bytes of artifacts and prepared weights kept"),
    _counter("executable_cache.bytes_fetched", "Bytes taken from the remote"),
    _counter("executable_cache.seconds", "Seconds spent in the store and its remote"),
)

GROUPS: dict[str, tuple[MetricRow, ...]] = {
    "Requests": _REQUESTS,
    "Queues on the way in and out": _BACKLOG,
    "Steps of the engine": _BATCHES,
    "Pages and the prefix cache": _PAGES,
    "Start": _START,
    "The cache of executables, as the engine worker uses it": _CACHE,
}
ROWS: tuple[MetricRow, ...] = tuple(row for rows in GROUPS.values() for row in rows)

_HEAD = """\
# Metrics

Written by `python -m max.serve.metric_table`; a test compares this file with the code.

`GET /metrics` on the API's port answers in the Prometheus text format; so does `--metrics-port`, where it is given.
A counter's name ends in `_total` there, and a histogram has `_bucket`, `_sum` and `_count`. With `--api-workers` the
values of all processes are summed. Besides these, `process_*` tells of the API process itself (of one API worker only).
Nothing is sent anywhere.
"""


def document() -> str:
    """The table as Markdown."""
    parts = [_HEAD]
    for title, rows in GROUPS.items():
        parts.append(f"## {title}\n")
        parts.append("| metric | in /metrics | kind | labels | meaning |\n|---|---|---|---|---|")
        for row in rows:
            labels = ", ".join(f"`{label}`" for label in row.labels)
            parts.append(f"| `{row.name}` | `{row.exposed}` | {row.kind} | {labels} | {row.meaning} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
