"""Tiny Llamas through the whole stack, from safetensors to tokens, against what transformers answered.

tests/parity/README.md tells how the references were made. Their greedy continuations have no near-ties, and so do those
of a prompt with a part of its continuation: batches and chunks must give these very tokens.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from max.cache import mef
from max.compiler import Target
from max.compiler.artifact import Options, compile_module
from max.compiler.limits import Limits
from max.compiler.native import library
from max.compiler.panels import Packing
from max.compiler.weights import Element
from max.models import kernels, text_graphs
from max.models.build import build_text_pipeline
from max.models.llama_config import Config
from max.runtime.arena import Arena
from max.runtime.checkpoint import Checkpoint
from max.runtime.engine import Engine
from max.runtime.model import Model
from max.runtime.prepared import layout_of, prepare_into
from max.runtime.request import Generation, Request
from max.runtime.sampling import SamplingParams
from max.runtime.scheduler import Chunk
from max.runtime.session import CompiledModels, InferenceSession
from max.runtime.step_inputs import StepWriter
from max.runtime.step_results import Token

PARITY = Path(__file__).parents[1] / "parity"
CONFIGS = json.loads((PARITY / "llama.json").read_text())
# Of the standard deviation of the logits.
TOLERANCE = 1e-4
GREEDY = SamplingParams(temperature=0)
# One bucket holds a whole prompt with logits for each of its tokens, the other a lone decode.
WHOLE = Limits(max_length=176, max_batch=64, page_tokens=16, num_pages=60, token_buckets=(1, 64))
# Prompts take three chunks; four rows of full length would need 44 pages.
CHUNKED = Limits(max_length=176, max_batch=4, page_tokens=16, num_pages=24, token_buckets=(1, 4, 16))
# Long steps, which compute few rows behind the last attention.
LONG = Limits(max_length=176, max_batch=4, page_tokens=16, num_pages=60, token_buckets=(1, 4, 128))
# What has its rotation change with the length cannot be cut into chunks that give the same.
PLAIN = [name for name in CONFIGS if not name.startswith("dynamic")]


@dataclass
class Pipeline:
    """The models of one checkpoint, and what transformers answers for it."""

    limits: Limits
    config: Config
    models: dict[str, Model]
    prompt: list[int]
    greedy: list[int]
    logits: np.ndarray
    last_logits: np.ndarray
    preempted: int = 0

    def engine(self) -> Engine:
        return Engine(self.models, self.limits, self.config.vocab_size)

    def answers(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        engine = self.engine()
        for request in requests:
            engine.add(request)
        found: dict[str, list[int]] = {request.id: [] for request in requests}
        while not engine.is_idle:
            for token in engine.step():
                assert isinstance(token, Token)
                found[token.request_id].append(token.id)
        assert engine.stats.ended == {"finished": len(requests)}
        assert engine.scheduler.pages.free == self.limits.num_pages - 1
        self.preempted = engine.scheduler.preempted
        return found

    def feed(self, row: Generation, count: int) -> np.ndarray:
        """Computes the row's next `count` tokens; the logits of the last of them, as many as the graph gives."""
        inputs = StepWriter(self.limits).write([Chunk.of(row, count)])
        (rows,) = inputs.arrays[-1].shape
        last = np.clip(np.arange(count - rows, count, dtype=np.int32), 0, None)
        row.computed += count
        return self.models[inputs.graph](*inputs.arrays[:-1], last)[0].to_numpy()[-count:]

    def row(self, tokens: list[int]) -> Generation:
        """A row in pages that are not in order, alone."""
        pages = list(range(2 * self.limits.max_pages, 0, -2))[: self.limits.max_pages]
        return Generation(Request("row", tokens), tokens, row=1, pages=pages)

    def assert_near(self, logits: np.ndarray, wanted: np.ndarray) -> None:
        assert logits.shape == wanted.shape
        assert np.abs(logits - wanted).max() <= TOLERANCE * self.logits.std()


def make_pipeline(name: str, folder: Path, limits: Limits, packing: Packing, element: Element = "float32") -> Pipeline:
    """packing: the encoding for the CPU kernels; empty for plain XLA, whose weights are of `element`."""
    spec = importlib.util.spec_from_file_location("seeded", PARITY / "seeded.py")
    assert spec and spec.loader
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    seeded.seeded_checkpoint(CONFIGS[name], folder)
    checkpoint = Checkpoint.open(folder)
    config = Config.from_hf(checkpoint.config)
    table = config.weights(packing).made_of(element)
    buffer = io.BytesIO()
    module = build_text_pipeline(checkpoint.architecture, config, limits, table)
    compile_module(module, Target.parse("cpu"), mef.MefWriter(buffer), Options(weights=table.to_json()))
    views = prepare_into(table, checkpoint, Arena(layout_of(table)), threads=1)
    models = InferenceSession().init_all(CompiledModels(mef.Mef.from_bytes(buffer.getvalue())), views)
    with np.load(PARITY / "references" / f"llama_{name}.npz") as reference:
        prompt, greedy = reference["prompt"].tolist(), reference["greedy"].tolist()
        return Pipeline(limits, config, models, prompt, greedy, reference["logits"], reference["last_logits"])


Make = Callable[[str, Limits], Pipeline]


@pytest.fixture(scope="module", params=["", "float32"], ids=["xla", "kernels"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Pipelines by config and limits, each made once; in plain XLA, and with the CPU kernels."""
    made: dict[tuple[str, Limits], Pipeline] = {}

    def pipeline(name: str, limits: Limits) -> Pipeline:
        if (name, limits) not in made:
            made[name, limits] = make_pipeline(name, tmp_path_factory.mktemp(name), limits, request.param)
        return made[name, limits]

    return pipeline


@pytest.mark.parametrize("name", CONFIGS)
def test_full_forward_and_greedy_continuation(make, name):
    pipeline = make(name, WHOLE)
    row = pipeline.row(list(pipeline.prompt))
    logits = pipeline.feed(row, 40)
    pipeline.assert_near(logits, pipeline.logits)
    for wanted in pipeline.greedy[:-1]:
        assert logits[-1].argmax() == wanted
        row.tokens.append(wanted)
        logits = pipeline.feed(row, 1)
    pipeline.assert_near(logits[-1], pipeline.last_logits)
    request = Request("a", pipeline.prompt, GREEDY, max_new_tokens=len(pipeline.greedy))
    assert pipeline.answers([request]) == {"a": pipeline.greedy}


@pytest.mark.parametrize("name", PLAIN)
def test_decoding_token_by_token_gives_the_logits_of_the_full_forward(make, name):
    pipeline = make(name, WHOLE)
    row = pipeline.row(list(pipeline.prompt))
    first = pipeline.feed(row, 3)
    rest = [pipeline.feed(row, 1) for _ in range(37)]
    pipeline.assert_near(np.concatenate([first, *rest]), pipeline.logits)


def test_chunks_give_the_logits_of_the_full_forward(make):
    pipeline = make("gqa2_llama3_tied", CHUNKED)
    for sizes in ((16, 16, 8), (4, 4, 4, 4, 4, 4, 16), (1, 2, 3, 4, 5, 6, 7, 8, 4), (15, 1, 16, 7, 1)):
        row = pipeline.row(list(pipeline.prompt))
        for size in sizes:
            logits = pipeline.feed(row, size)
            pipeline.assert_near(logits, pipeline.logits[: row.computed][-len(logits) :])
        assert row.computed == 40


def parts(pipeline: Pipeline, starts: Sequence[int], new: int) -> tuple[list[Request], dict[str, list[int]]]:
    """Requests that go on from some way into the reference's continuation, and their answers."""
    requests, wanted = [], {}
    for start in starts:
        prompt = pipeline.prompt + pipeline.greedy[:start]
        requests.append(Request(str(start), prompt, GREEDY, max_new_tokens=new))
        wanted[str(start)] = pipeline.greedy[start : start + new]
    return requests, wanted


@pytest.mark.parametrize(("name", "limits"), [("gqa2_llama3_tied", CHUNKED), ("gqa8_linear_biases", WHOLE)])
def test_a_batch_gives_every_request_the_tokens_that_it_gets_alone(make, name, limits):
    pipeline = make(name, limits)
    requests, wanted = parts(pipeline, (0, 3, 30, 31, 64, 90), 36)
    assert pipeline.answers(requests) == wanted
    for request in requests[1::3]:
        assert pipeline.answers([request]) == {request.id: wanted[request.id]}


@pytest.mark.parametrize("packing", ["float32", "q8_0"])
@pytest.mark.skipif(library() is None, reason="the package was installed without a C++ compiler")
def test_long_steps_give_the_bits_of_short_ones(tmp_path: Path, packing: Packing) -> None:
    """On the kernels no row depends on the others: whether the last block computes all of a step's, or one."""
    found = []
    for limits in (LONG, CHUNKED):
        pipeline = make_pipeline("gqa2_llama3_tied", tmp_path, limits, packing)
        row = pipeline.row(list(pipeline.prompt))
        steps = [40] if limits is LONG else [16, 16, 8]
        prompt = [pipeline.feed(row, count) for count in steps][-1]
        row.tokens.append(pipeline.greedy[0])
        found.append((prompt, pipeline.feed(row, 1)))  # the next token reads what the prompt left in the pages
    for long, short in zip(*found, strict=True):
        np.testing.assert_array_equal(long, short)


def test_long_steps_give_the_tokens_of_the_reference(make):
    pipeline = make("gqa2_llama3_tied", LONG)
    pipeline.assert_near(pipeline.feed(pipeline.row(list(pipeline.prompt)), 40), pipeline.logits[-1:])
    requests, wanted = parts(pipeline, (0, 3, 30, 31, 64, 90), 36)
    assert pipeline.answers(requests) == wanted


def test_requests_that_gave_way_go_on_as_if_they_had_not(make):
    pipeline = make("gqa2_llama3_tied", CHUNKED)
    requests, wanted = parts(pipeline, (0, 1, 2, 3), 100)
    assert pipeline.answers(requests) == wanted
    assert pipeline.preempted > 0


def test_draws_depend_on_seed_and_position_alone(make):
    pipeline = make("gqa2_llama3_tied", CHUNKED)

    def request(name: str, seed: int, **settings: float) -> Request:
        return Request(name, pipeline.prompt, SamplingParams(seed=seed, **settings), max_new_tokens=40)  # type: ignore[arg-type]

    alone = pipeline.answers([request("a", 7, temperature=0.9, top_p=0.95)])["a"]
    batch = pipeline.answers(
        [
            request("greedy", 7, temperature=0.0),
            request("again", 7, temperature=0.9, top_p=0.95),
            request("other", 8, temperature=0.9, top_p=0.95),
            request("penalized", 7, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0),
        ]
    )
    assert batch["again"] == alone
    assert batch["other"] != alone
    assert batch["greedy"] == pipeline.greedy[:40]
    assert batch["penalized"] != batch["greedy"]
    assert len(set(batch["penalized"])) > len(set(batch["greedy"]))


@pytest.mark.skipif(library() is None, reason="the package was installed without a C++ compiler")
def test_heads_that_the_kernel_does_not_take_are_left_to_xla(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit is lowered, as a model beyond the real one is large."""
    monkeypatch.setattr(kernels, "MAX_HEAD_DIM", 8)
    monkeypatch.setattr(text_graphs, "attention", None)  # nothing calls it
    pipeline = make_pipeline("gqa2_llama3_tied", tmp_path, WHOLE, "float32")
    assert [record.getMessage() for record in caplog.records if "attention" in record.getMessage()] == [
        f"attention is computed by plain XLA: heads have {pipeline.config.head_dim} dimensions, "
        "and the kernel takes at most 8"
    ]
    pipeline.assert_near(pipeline.feed(pipeline.row(list(pipeline.prompt)), 40), pipeline.logits)
    requests, wanted = parts(pipeline, (0, 3, 30), 20)
    assert pipeline.answers(requests) == wanted


DRAWS: list[dict[str, Any]] = [
    {"top_k": 50},
    {"temperature": 1.5, "top_p": 0.9},
    {"min_p": 0.01, "repetition_penalty": 1.3},
    {"temperature": 0.7, "top_k": 100, "top_p": 0.95, "frequency_penalty": 0.5, "bias": {3: 5.0}},
]


@pytest.mark.parametrize("name", ["mha_default", "gqa2_llama3_tied"])
def test_weights_of_bfloat16_without_kernels_stay_near_the_reference(tmp_path: Path, name: str) -> None:
    """As devices compute; XLA sums in another order for other buckets, which here moves logits as rounding does."""
    pipeline = make_pipeline(name, tmp_path, replace(WHOLE, page_format="bfloat16"), "", "bfloat16")
    row = pipeline.row(list(pipeline.prompt))
    logits = pipeline.feed(row, 40)
    assert 1e-3 < np.abs(logits - pipeline.logits).max() / pipeline.logits.std() <= 0.15
    for wanted in pipeline.greedy[:-1]:
        row.tokens.append(wanted)
        logits = pipeline.feed(row, 1)
    assert np.abs(logits[-1] - pipeline.last_logits).max() <= 0.15 * pipeline.logits.std()
    request = Request("a", pipeline.prompt, GREEDY, max_new_tokens=8)
    assert len(pipeline.answers([request])["a"]) == 8


@pytest.mark.parametrize(("packing", "most", "typical"), [("bfloat16", 0.12, 0.02), ("q8_0", 0.35, 0.05)])
def test_smaller_encodings_stay_near_the_reference(
    tmp_path: Path, packing: Packing, most: float, typical: float
) -> None:
    """The shares of the logits' std are what rounding weights and activations moves them by, not a fault of order.

    Of q8_0, the values of the weights alone move the logits by 0.23 at most and 0.032 on the root mean square, and
    rounding activations, which tests/integration/test_gguf_model.py looks at alone, by 0.16 and 0.029.
    """
    pipeline = make_pipeline("mha_default", tmp_path, replace(WHOLE, page_format="bfloat16"), packing)
    logits = pipeline.feed(pipeline.row(list(pipeline.prompt)), 40)
    shares = (logits - pipeline.logits) / pipeline.logits.std()
    assert np.abs(shares).max() <= most and np.sqrt(np.mean(shares**2)) <= typical
    assert {pages.dtype for pages in pipeline.models["step_t1_r1"]._spec.state} == {"bfloat16"}
    requests, _ = parts(pipeline, (0, 3, 30), 24)
    for i, settings in enumerate(DRAWS):
        requests.append(
            Request(f"drawn {i}", pipeline.prompt[i:], SamplingParams(seed=i, **settings), max_new_tokens=24)
        )
    together = pipeline.answers(requests)
    assert all(pipeline.answers([request]) == {request.id: together[request.id]} for request in requests)
