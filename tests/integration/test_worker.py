"""The engine worker as a process: it answers as `max generate` does, dies without harm, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from max import MaxError, RequestError
from max.cache.config import CacheConfig
from max.compiler.config import CompileConfig
from max.runtime.config import BatchConfig, ModelConfig, QueueConfig
from max.serve.engine_client import EngineClient
from max.serve.engine_port import EngineUnavailable
from max.serve.messages import Sampling, StartFailed, Submit, Tokens
from max.serve.pipeline import PipelineConfig
from max.serve.supervisor import Supervisor
from max.serve.worker_config import WorkerConfig

GREEDY = Sampling(temperature=0)


@pytest.fixture
def config(model: Path, filled_cache: Path) -> WorkerConfig:
    """What `max generate` with the settings SMALL uses, so that nothing has to be compiled."""
    pipeline = PipelineConfig(
        model=ModelConfig(max_length=64),
        compiling=CompileConfig(),
        batch=BatchConfig(max_batch_size=1, max_batch_input_tokens=2),
        cache=CacheConfig(cache_dir=filled_cache, cache_policy="require"),
    )
    return WorkerConfig(folder=model, pipeline=pipeline)


def run[T](work: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(60):
            return await work()

    return asyncio.run(limited())


@asynccontextmanager
async def serving(config: WorkerConfig) -> AsyncIterator[tuple[EngineClient, Supervisor]]:
    supervisor = Supervisor(config)
    async with EngineClient(supervisor.endpoint, supervisor) as client:
        await becomes(client, "ready")
        yield client, supervisor


async def becomes(client: EngineClient, state: str) -> None:
    while client.state != state:
        await asyncio.sleep(0.005)


async def collect(client: EngineClient, request: Submit) -> list[Tokens]:
    return [tokens async for batch in client.generate(request) for tokens in batch]


def ids(answer: list[Tokens]) -> list[int]:
    return [id for tokens in answer for id in tokens.token_ids]


def test_it_answers_what_max_generate_answers(config, generate):
    command = generate("--temperature", "0", "--max-new-tokens", "20", "--json", "--ignore-eos")
    stats = json.loads(command.out)
    from max.serve.text_side import TextSide

    text = TextSide.load(config.folder)
    prompt = text.prompt_ids("hello", apply_chat_template=None)

    async def work():
        async with serving(config) as (client, _):
            assert client.ready is not None
            assert client.ready.max_length == 64
            assert client.ready.artifact_source == "cache: bound"
            assert client.ready.seconds.keys() == {"spawn", "build", "compile", "init", "total"}
            return await collect(client, Submit("a", prompt, GREEDY, max_new_tokens=20, ignore_eos=True))

    answer = run(work)
    assert len(ids(answer)) == stats["new_tokens"] == 20
    assert text.tokenizer.decode(ids(answer)) == stats["text"]
    assert [tokens.finish_reason for tokens in answer][-2:] == [None, "length"]


def test_a_request_that_cannot_be_answered_is_refused_and_the_others_go_on(config):
    async def work():
        async with serving(config) as (client, _):
            for wrong in (Submit("a", [10**6], GREEDY), Submit("b", [], GREEDY), Submit("c", [5], Sampling(top_p=7))):
                with pytest.raises(RequestError) as caught:
                    await collect(client, wrong)
                assert caught.value.hint
            good = asyncio.create_task(collect(client, Submit("d", [5], GREEDY, max_new_tokens=30, ignore_eos=True)))
            await asyncio.sleep(0)
            with pytest.raises(RequestError, match="in work already"):
                await collect(client, Submit("d", [5], GREEDY))
            assert len(ids(await good)) == 30

    run(work)


def test_closing_a_stream_early_frees_its_row(config):
    """There is one row: another request is answered while the first one's context is far from full."""

    async def work():
        async with serving(config) as (client, _):
            stream = client.generate(Submit("a", [5], GREEDY, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()
            assert len(ids(await collect(client, Submit("b", [5], GREEDY, max_new_tokens=3, ignore_eos=True)))) == 3

    run(work)


def test_two_processes_may_use_one_engine_and_the_end_of_one_ends_its_requests_only(config):
    async def work():
        async with serving(config) as (first, supervisor):
            async with EngineClient(supervisor.endpoint) as second:
                await becomes(second, "ready")
                request = Submit("same name", [5], GREEDY, max_new_tokens=40, ignore_eos=True)
                kept = asyncio.create_task(collect(first, request))
                # One at a time is computed, so that the last of so many waits when its client goes.
                many = [Submit(name, [5], GREEDY, max_new_tokens=40) for name in ("same name", *map(str, range(100)))]
                lost = [asyncio.create_task(collect(second, each)) for each in many]
                await asyncio.sleep(0.01)
            with pytest.raises(EngineUnavailable):
                await lost[-1]
            await asyncio.gather(*lost, return_exceptions=True)
            assert len(ids(await kept)) == 40
            assert first.state == "ready"

    run(work)


def test_a_killed_worker_fails_its_requests_and_comes_back(config):
    async def work():
        async with serving(config) as (client, supervisor):
            requests = [Submit(f"r{i}", [5], GREEDY, ignore_eos=True) for i in range(50)]
            streams = [asyncio.create_task(collect(client, request)) for request in requests]
            await asyncio.sleep(0.05)
            dead = supervisor.pid
            os.kill(dead, signal.SIGKILL)
            ended = await asyncio.gather(*streams, return_exceptions=True)
            assert [stream for stream in ended if isinstance(stream, MaxError)], "some were at work"
            for stream in ended:
                assert isinstance(stream, list) or (type(stream) is MaxError and stream.kind == "internal")
            assert client.state == "restarting"
            with pytest.raises(EngineUnavailable, match="restarting"):
                await collect(client, requests[0])
            await becomes(client, "ready")
            assert supervisor.pid != dead
            assert len(ids(await collect(client, Submit("z", [5], GREEDY, max_new_tokens=5, ignore_eos=True)))) == 5

    run(work)


def test_a_model_that_cannot_be_loaded_is_told_once(config, tmp_path):
    async def work() -> tuple[StartFailed, str]:
        supervisor = Supervisor(config.model_copy(update={"folder": tmp_path / "nothing"}))
        async with EngineClient(supervisor.endpoint, supervisor) as client:
            failure = await client.failed()
            assert client.progress == failure
            assert supervisor.restarts == 0
            return failure, client.state

    failure, state = run(work)
    assert (failure.kind, state) == ("user", "failed")
    assert "nothing" in failure.message
    assert failure.hint


def test_a_worker_that_keeps_dying_before_it_is_ready_is_given_up(config, monkeypatch, tmp_path):
    """A module that ends every process that imports it stands in for a library that crashes."""
    (tmp_path / "msgspec.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("max.serve.supervisor._pause", lambda quick_ends: 0.0)
    supervisor = Supervisor(config)
    failure = run(supervisor.run)
    run(supervisor.stop)
    assert failure is not None
    assert failure.message == "the engine worker ended with exit code 9"
    assert supervisor.restarts == 3


def test_requests_beyond_the_queue_are_refused_as_a_matter_of_capacity(config):
    async def work():
        limited = config.model_copy(update={"queue": QueueConfig(max_queue_size=2)})
        async with serving(limited) as (client, _):
            requests = [Submit(f"r{i}", [5], GREEDY, ignore_eos=True) for i in range(6)]
            ended = await asyncio.gather(*(collect(client, each) for each in requests), return_exceptions=True)
            refused = [each for each in ended if isinstance(each, MaxError)]
            assert [each.kind for each in refused] == ["capacity"] * 3
            assert all(len(ids(each)) == 63 for each in ended if isinstance(each, list))

    run(work)


def test_draining_lets_requests_finish_and_takes_no_new_ones(config):
    async def work():
        async with serving(config) as (client, supervisor):
            request = Submit("a", [5], GREEDY, max_new_tokens=30, ignore_eos=True)
            stream = asyncio.create_task(collect(client, request))
            await asyncio.sleep(0.005)
            drained = asyncio.create_task(client.drain(30))
            await asyncio.sleep(0)
            assert client.state == "draining"
            with pytest.raises(EngineUnavailable, match="draining"):
                await collect(client, Submit("b", [5], GREEDY))
            assert len(ids(await stream)) == 30
            await drained
            assert not Path(supervisor.endpoint.removeprefix("ipc://")).parent.exists()
            with pytest.raises(ProcessLookupError):
                os.kill(supervisor.pid, 0)

    run(work)


def test_what_is_not_done_when_the_time_is_up_is_ended(config):
    async def work():
        async with serving(config) as (client, _):
            stream = asyncio.create_task(collect(client, Submit("a", [5], GREEDY, ignore_eos=True)))
            await asyncio.sleep(0)
            await client.drain(0)
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await stream

    run(work)


_SUPERVISE = """
import asyncio, sys
from max.serve.supervisor import Supervisor
from max.serve.worker_config import WorkerConfig

supervisor = Supervisor(WorkerConfig.model_validate_json(sys.stdin.readline()))
print(supervisor.pid, flush=True)
asyncio.run(supervisor.run())
"""


def test_no_worker_outlives_its_supervisor(config):
    process = subprocess.Popen([sys.executable, "-c", _SUPERVISE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(config.model_dump_json().encode() + b"\n")
    process.stdin.flush()
    worker = int(process.stdout.readline())
    assert is_running(worker)
    process.kill()
    process.communicate()
    ends = time.monotonic() + 20
    while is_running(worker):
        assert time.monotonic() < ends, "the worker goes on without its supervisor"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
