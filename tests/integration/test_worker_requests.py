"""Many requests at once through the worker: each gets, to the last bit, what it gets when it is alone.

The reference runs one request after the other in an engine of this process, without shared pages. On the CPU kernels
sums do not depend on what is computed beside them; without kernels there is no such promise.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from max.cache.config import CacheConfig
from max.compiler import native
from max.compiler.config import CompileConfig
from max.runtime.checkpoint import Checkpoint
from max.runtime.config import BatchConfig, ModelConfig, SchedulingConfig
from max.runtime.engine import Engine
from max.runtime.request import Request
from max.runtime.sampling import SamplingParams
from max.runtime.step_results import Token
from max.runtime.text_engine import start
from max.serve.engine_client import EngineClient
from max.serve.messages import Sampling, Submit, Tokens
from max.serve.pipeline import PipelineConfig, preparation_of
from max.serve.supervisor import Supervisor
from max.serve.text_side import TextSide
from max.serve.worker_config import WorkerConfig

VOCAB = 640
MAX_LENGTH = 64
Answer = list[tuple[int, float | None, str | None]]
"""Of each token: its id, its log-probability where it was asked for, why it was the last."""

pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not built")


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    """Pages of 8 tokens and chunks of 16, so that prompts are shared and cut in many ways; few pages, so that some
    give way."""
    pipeline = PipelineConfig(
        model=ModelConfig(max_length=MAX_LENGTH),
        compiling=CompileConfig(),
        batch=BatchConfig(
            max_batch_size=4, max_batch_input_tokens=16, kv_cache_page_size=8, max_batch_total_tokens=128
        ),
        cache=CacheConfig(cache_dir=tmp_path_factory.mktemp("requests")),
    )
    return WorkerConfig(folder=model, pipeline=pipeline)


def random_request(rng: random.Random, number: int) -> Submit:
    """Greedy or drawn, short or long, many of them with one of two beginnings."""
    beginning = [(number % 2 + 3 * i) % VOCAB for i in range(rng.choice([0, 7, 8, 17, 40]))]
    prompt = [*beginning, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 9)))]
    sampling = Sampling(temperature=0.0)
    if rng.random() < 0.5:
        sampling = Sampling(
            temperature=rng.choice([0.3, 1.0]),
            top_k=rng.choice([0, 5, 40]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.5]),
            seed=rng.getrandbits(64),
        )
    new = rng.randint(1, 14)
    return Submit(
        str(number),
        prompt,
        sampling,
        max_new_tokens=new,
        min_new_tokens=rng.choice([0, 0, min(3, new)]),
        stop_token_ids=rng.sample(range(VOCAB), rng.choice([0, 60])),
        top_logprobs=rng.choice([None, 3]),
    )


def alone(engine: Engine, submit: Submit) -> Answer:
    sampling = SamplingParams(**{name: getattr(submit.sampling, name) for name in submit.sampling.__struct_fields__})
    engine.add(
        Request(
            submit.id,
            submit.prompt_ids,
            sampling,
            submit.max_new_tokens,
            submit.min_new_tokens,
            frozenset(submit.stop_token_ids),
            top_logprobs=submit.top_logprobs,
        )
    )
    answer: Answer = []
    while not engine.is_idle:
        for token in engine.step():
            assert isinstance(token, Token)
            answer.append((token.id, token.logprobs and token.logprobs.token, token.finish_reason))
    return answer


@pytest.fixture(scope="module")
def expected(config: WorkerConfig) -> tuple[list[Submit], list[Answer]]:
    rng = random.Random(7)
    requests = [random_request(rng, number) for number in range(500)]
    text = TextSide.load(config.folder)
    preparation = preparation_of(
        config.pipeline, Checkpoint.open(config.folder), lambda: text, lambda *_: None, keep_weights=True
    )
    scheduling = SchedulingConfig(enable_prefix_caching=False)
    engine = start(preparation.run, preparation.store, scheduling=scheduling).engine
    return requests, [alone(engine, request) for request in requests]


async def collect(client: EngineClient, request: Submit) -> list[Tokens]:
    return [tokens async for batch in client.generate(request) for tokens in batch]


def flat(answer: list[Tokens]) -> Answer:
    return [
        (tokens.token_ids[0], tokens.logprobs[0].token if tokens.logprobs else None, tokens.finish_reason)
        for tokens in answer
    ]


@pytest.mark.parametrize(
    "scheduling",
    [
        SchedulingConfig(),
        SchedulingConfig(enable_overlap_scheduler=True),
        SchedulingConfig(enable_in_flight_batching=False, enable_prefix_caching=False),
    ],
    ids=["default", "overlap", "turns"],
)
def test_five_hundred_streams_at_once_get_what_each_gets_alone(config, expected, scheduling):
    requests, wanted = expected

    async def work() -> list[list[Tokens]]:
        supervisor = Supervisor(config.model_copy(update={"scheduling": scheduling}))
        async with asyncio.timeout(120), EngineClient(supervisor.endpoint, supervisor) as client:
            while client.state != "ready":
                await asyncio.sleep(0.01)
            return await asyncio.gather(*(collect(client, request) for request in requests))

    answers = asyncio.run(work())
    assert [flat(answer) for answer in answers] == wanted
    cached = sum(tokens.cached_tokens for answer in answers for tokens in answer)
    assert (cached > 1000) == scheduling.enable_prefix_caching
