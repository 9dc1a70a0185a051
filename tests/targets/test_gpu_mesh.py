"""The step of an 8B Llama for two GPUs that are not here: what they exchange, and that each has half of the rest."""

from __future__ import annotations

import math
import re

import pytest
from flax import nnx

from max.compiler import Module, Target, segments, xla_lowering
from max.compiler.compile_messages import Answer, Job
from max.compiler.compile_process import compiling
from max.compiler.limits import Limits
from max.compiler.merge import merge
from max.compiler.targets.toolchain import missing, why_not
from max.compiler.targets.xla_options import Products, xla_options
from max.models import llama
from max.models.gpu_text_graphs import GpuStepBuilder
from max.models.llama_config import Config
from max.models.rope import Rope

LAYERS, TOKENS, DEVICES = 4, 8, 2  # every layer is the same
LLAMA = Config(128256, 4096, 14336, LAYERS, 32, 8, 128, 1e-5, 8192, Rope(128, 500000.0))
LIMITS = Limits(2048, 8, 16, 2048, (TOKENS,), "bfloat16")


@pytest.fixture(scope="module")
def compiled() -> Answer:
    target = Target.parse("cuda:sm_90").over(DEVICES)
    if reason := why_not(target):
        pytest.skip(reason)
    if absent := missing(target):
        pytest.skip(f"{' and '.join(absent)} not installed")
    part = LLAMA.part(DEVICES)
    decoder = nnx.eval_shape(lambda: llama.Llama(part, rngs=nnx.Rngs(0), devices=DEVICES))
    table = LLAMA.weights().made_of("bfloat16").by_output().split(LLAMA.sharding(DEVICES))
    graph = GpuStepBuilder(decoder, part, LIMITS, table, DEVICES).add(Module("m"), TOKENS, LIMITS.max_batch)
    merged = merge("m", {graph.name: xla_lowering.lower(graph, target.xla_platform).stablehlo})
    plan = segments.split(merged, {graph.name: [len(table.weights)]}, use_subgraphs=True)
    module = xla_lowering.bytecode(segments.extract(merged, graph.name, plan.aliases[graph.name]))
    with compiling(target, 1) as process:
        process.submit(Job(graph.name, module, xla_options(target, graph.name, Products("bfloat16"))))
        return process.answer()


def collectives(hlo: str) -> list[tuple[str, int]]:
    """Each collective operation with the bytes of what it gives; one that runs beside others counts once."""
    found = re.findall(r"= .*?(\w+)\[([\d,]*)\]\S*?(?:\))? (all-\w+|collective-\w+|reduce-scatter)(?:-done)?\(", hlo)
    size = {"bf16": 2, "f32": 4}
    return [(kind, size[dtype] * math.prod(map(int, shape.split(",")))) for dtype, shape, kind in found]


def test_devices_exchange_two_sums_a_layer_one_of_the_embedding_and_the_logits(compiled: Answer) -> None:
    found = collectives(compiled.optimized_hlo)
    activations, logits = 2 * TOKENS * LLAMA.hidden_size, 4 * LIMITS.max_batch * LLAMA.vocab_size
    print(f"{found}, {compiled.memory}, {len(compiled.executable)} bytes of code")
    sums = [nbytes for kind, nbytes in found if kind == "all-reduce"]
    assert sums == [activations] * (2 * LAYERS + 1)
    assert [each for each in found if each[0] != "all-reduce"] == [("all-gather", logits)], "no weight is gathered"


def test_each_device_has_half_and_nothing_of_it_is_copied(compiled: Answer) -> None:
    pool = 2 * LAYERS * LIMITS.num_pages * 2 * LLAMA.kv_width * LIMITS.page_tokens
    assert compiled.memory["aliased"] == pool // DEVICES, "pages are updated in place"
    norms = 2 * (2 * LAYERS + 1) * LLAMA.hidden_size
    whole = 2 * sum(math.prod(weight.shape) for weight in LLAMA.weights().weights)
    small = 1 << 20
    assert abs(compiled.memory["arguments"] - ((whole - norms) // DEVICES + norms + pool // DEVICES)) < small
    logits = 4 * LIMITS.max_batch * LLAMA.vocab_size
    assert compiled.memory["temporary"] <= 4 * logits
    for shape in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.optimized_hlo):
        assert math.prod(map(int, shape.split(","))) <= LIMITS.max_batch * LLAMA.vocab_size, "no weight, no page"
