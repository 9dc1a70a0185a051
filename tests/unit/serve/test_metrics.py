"""Values reach /metrics in a form that Prometheus' own parser reads, under the names of the table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from max.cache.counters import Counters
from max.serve.messages import Ready, StepStats, StoreStats
from max.serve.metric_table import ROWS, document
from max.serve.metrics import MULTIPROCESS_VARIABLE, Metrics

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[3]


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, sorted labels) -> value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def step(**changes: object) -> StepStats:
    values: dict[str, object] = {
        "batch_type": "TG",
        "batch_size": 3,
        "input_tokens": 3,
        "new_tokens": 3,
        "context_tokens": 90,
        "queued": 5,
        "running": 3,
        "execution_s": 0.01,
        "creation_s": 0.001,
        "terminated": 1,
        "used_pages": 20,
        "num_pages": 80,
        "total_preempted": 2,
        "total_cache_hit_tokens": 100,
        "total_cache_miss_tokens": 50,
        "total_cache_hit_pages": 7,
    }
    return StepStats(**values | changes)  # pyright: ignore[reportArgumentType]


def test_every_row_is_exposed_once_with_its_type() -> None:
    families = list(text_string_to_metric_families(Metrics().exposition().decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    kinds = {family.name: family.type for family in families}
    assert {row.exposed: row.kind for row in ROWS} == {name: kinds[name] for name in (row.exposed for row in ROWS)}
    assert all(family.documentation for family in families)


def test_steps() -> None:
    metrics = Metrics()
    metrics.stepped(step())
    metrics.stepped(step(batch_type="CE", input_tokens=64, total_cache_hit_tokens=160, total_cache_hit_pages=9))
    found = samples(metrics.exposition().decode())
    decode, prefill = (("batch_type", "TG"),), (("batch_type", "CE"),)
    assert found["maxserve_batch_size_sum", decode] == 3 and found["maxserve_batch_size_count", prefill] == 1
    assert found["maxserve_batch_input_tokens_sum", prefill] == 64
    assert found["maxserve_batch_execution_time_milliseconds_sum", decode] == 10
    assert found["maxserve_batch_generation_throughput_tokens_per_second_sum", decode] == 300
    assert found["maxserve_num_requests_queued", ()] == 5
    assert found["maxserve_cache_num_used_blocks", ()] == 20
    assert found["maxserve_cache_used_kv_pct_percent_sum", ()] == 50
    assert found["maxserve_cache_hits_tokens_total", (("tier", "g0"),)] == 160
    assert found["maxserve_cache_misses_tokens_total", ()] == 50
    assert found["maxserve_cache_device_blocks_served_blocks_total", ()] == 9
    assert found["maxserve_cache_preemption_count_total", ()] == 2


def test_messages_that_wait_for_their_clients() -> None:
    metrics = Metrics()
    metrics.taken(2, 0.005, 3)
    found = samples(metrics.exposition().decode())
    assert found["maxserve_num_responses_buffered", ()] == 3
    assert found["maxserve_responses_buffered_sum", ()] == 5
    assert found["maxserve_response_queue_time_milliseconds_sum", ()] == 5


def ready(seconds: dict[str, float], cache: Counters) -> Ready:
    return Ready(10, 10, 1, 1, 8, "float32", "cpu", "/a.mef", "cache", seconds, cache.to_json())


def test_counts_go_on_when_the_worker_begins_again() -> None:
    metrics = Metrics()
    metrics.became_ready(ready({}, Counters()))
    metrics.stepped(step(total_preempted=7))
    metrics.became_ready(ready({}, Counters()))
    metrics.stepped(step(total_preempted=7))
    metrics.stepped(step(total_preempted=8))
    found = samples(metrics.exposition().decode())
    assert found["maxserve_cache_preemption_count_total", ()] == 15


def test_the_store_is_counted_beyond_the_start() -> None:
    metrics, started = Metrics(), Counters(Counter(exact=1), bytes_read=500)
    metrics.became_ready(ready({}, started))
    metrics.stored(StoreStats(started.to_json(), 4))
    later = Counters(Counter(exact=1), Counter(damaged=1), Counter(lowered=1), quarantined=1, bytes_read=700)
    metrics.stored(StoreStats(later.to_json(), 6))
    metrics.became_ready(ready({}, started))
    metrics.stored(StoreStats(started.to_json(), 6))
    found = samples(metrics.exposition().decode())
    assert found["maxserve_executables_loaded_total", ()] == 12
    assert found["maxserve_executable_cache_hits_total", (("kind", "exact"),)] == 2
    assert found["maxserve_executable_cache_misses_total", (("reason", "damaged"),)] == 1
    assert found["maxserve_executable_cache_quarantined_total", ()] == 1
    assert found["maxserve_executable_cache_bytes_read_total", ()] == 1200


def test_one_process_of_several_counts_what_the_worker_says() -> None:
    metrics = Metrics(records_steps=False)
    metrics.became_ready(ready({}, Counters(bytes_read=5)))
    metrics.stored(StoreStats(Counters(bytes_read=7).to_json(), 6))
    found = samples(metrics.exposition().decode())
    assert (
        found["maxserve_executables_loaded_total", ()] == found["maxserve_executable_cache_bytes_read_total", ()] == 0
    )


def test_the_start_is_counted_once_by_where_the_executables_came_from() -> None:
    metrics = Metrics("m")
    first = ready({"build": 0.5, "total": 2.0}, Counters(Counter(exact=1), bytes_read=5000, seconds=0.5))
    metrics.became_ready(first)
    metrics.became_ready(first)
    missed_it = Counters(misses=Counter(absent=1), made=Counter(traced=1), bytes_written=7)
    metrics.became_ready(ready({"total": 9.0}, missed_it))
    found = samples(metrics.exposition().decode())
    assert found["maxserve_model_load_time_milliseconds_sum", (("component", "total"),)] == 11_000
    assert found["maxserve_model_load_time_milliseconds_count", (("component", "build"),)] == 1
    assert found["maxserve_pipeline_load_total", (("model", "m"),)] == 2
    cache = {name.removeprefix("maxserve_executable_cache_"): value for (name, _), value in found.items()}
    assert found["maxserve_executable_cache_hits_total", (("kind", "exact"),)] == 1
    assert found["maxserve_executable_cache_misses_total", (("reason", "absent"),)] == 1
    assert found["maxserve_executable_cache_made_total", (("source", "traced"),)] == 1
    assert (cache["bytes_read_total"], cache["bytes_written_total"], cache["seconds_total"]) == (5000, 7, 0.5)


def test_every_figure_of_the_cache_has_its_row() -> None:
    counted = Counters(Counter(exact=1), Counter(absent=1), Counter(traced=1))
    rows = {row.exposed: row for row in ROWS}
    for sample in counted.samples():
        row = rows[f"maxserve_{sample.name}"]
        assert (row.labels, row.meaning) == (tuple(sample.labels), sample.help)


async def test_requests(client: httpx2.AsyncClient) -> None:
    body = {"model": "org/echo", "prompt": "a robot", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    await client.post("/v1/completions", json=body)
    await client.post("/v1/completions", json=body | {"top_k": -9})
    await client.get("/made/up/path")
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    assert found["maxserve_request_count_total", (("code", "200"), ("path", "/v1/completions"))] == 1
    assert found["maxserve_request_count_total", (("code", "400"), ("path", "/v1/completions"))] == 1
    assert found["maxserve_request_count_total", (("code", "404"), ("path", "unmatched"))] == 1
    assert found["maxserve_num_output_tokens_total", ()] == 5
    assert found["maxserve_output_tokens_per_request_tokens_sum", ()] == 5
    assert found["maxserve_time_to_first_token_milliseconds_count", ()] == 1
    assert found["maxserve_itl_milliseconds_count", ()] == 4
    assert found["maxserve_time_per_output_token_milliseconds_count", ()] == 1
    assert found["maxserve_num_requests_awaiting_admission", ()] == 0
    assert found["maxserve_requests_awaiting_admission_count", ()] == 1
    for part in ("input", "output"):
        assert found[f"maxserve_{part}_processing_time_milliseconds_count", ()] == 1
    both = sum(found[f"maxserve_{part}_processing_time_milliseconds_sum", ()] for part in ("input", "output"))
    path = (("path", "/v1/completions"),)
    assert 0 < both <= found["maxserve_request_time_milliseconds_sum", path]
    assert "made/up" not in answer.text


def test_several_processes_are_summed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from max.serve.metrics import Metrics; metrics = Metrics(); "
        "metrics['num_output_tokens'].inc(int(sys.argv[1])); metrics['num_responses_buffered'].set(2); "
        "[metrics.arrived() for _ in range(2)]; metrics.handed_over(); "
        "sys.stdout.write(metrics.exposition().decode()); sys.stdout.flush(); sys.stdin.read()"
    )
    environ = {**os.environ, MULTIPROCESS_VARIABLE: str(tmp_path)}
    pipe = subprocess.PIPE
    commands = [[sys.executable, "-c", code, str(count)] for count in (3, 4)]
    first = subprocess.Popen(commands[0], stdin=pipe, stdout=subprocess.DEVNULL, env=environ)
    while not list(tmp_path.glob("gauge_livesum_*")):
        assert first.poll() is None
    second = subprocess.run(commands[1], input=b"", capture_output=True, env=environ, check=True)
    first.communicate(b"")
    found = samples(second.stdout.decode())
    assert found["maxserve_num_output_tokens_total", ()] == 7
    assert found["maxserve_num_responses_buffered", ()] == 4
    assert found["maxserve_num_requests_awaiting_admission", ()] == 2


def test_the_document_is_that_of_the_code() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == document(), (
        "python -m max.serve.metric_table > docs/metrics.md"
    )
