"""The step of Llama 3 8B compiled for a GPU that is not here: its kernels, what is copied, how large the code is."""

from __future__ import annotations

import re
from pathlib import Path

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

LLAMA = Config(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 8192, Rope(128, 500000.0))
LIMITS = Limits(2048, 8, 16, 2048, (8, 512), "bfloat16")
WEIGHT_BYTES = 16_060_522_496  # 8 030 261 248 parameters in bfloat16


def compile_step(tokens: int, folder: Path) -> Answer:
    """Compiles one step for sm_90 with the options that ship; weights stay abstract. XLA's dumps go to the folder."""
    target = Target.parse("cuda:sm_90")
    if reason := why_not(target):
        pytest.skip(reason)
    if absent := missing(target):
        pytest.skip(f"{' and '.join(absent)} not installed")
    decoder = nnx.eval_shape(lambda: llama.Llama(LLAMA, rngs=nnx.Rngs(0)))
    table = LLAMA.weights().made_of("bfloat16").by_output()
    graph = GpuStepBuilder(decoder, LLAMA, LIMITS, table).add(Module("m"), tokens, LIMITS.max_batch)
    merged = merge("m", {graph.name: xla_lowering.lower(graph, target.xla_platform).stablehlo})
    plan = segments.split(merged, {graph.name: [len(table.weights)]}, use_subgraphs=True)
    module = xla_lowering.bytecode(segments.extract(merged, graph.name, plan.aliases[graph.name]))
    with compiling(target, 1) as process:
        process.submit(Job(graph.name, module, xla_options(target, graph.name, Products("bfloat16")), str(folder)))
        return process.answer()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "temporary_bytes", "code_bytes"), [(8, 1 << 20, 800_000), (512, 64 << 20, 1_000_000)]
)
def test_the_step_of_an_8b_model(tokens: int, temporary_bytes: int, code_bytes: int, tmp_path: Path) -> None:
    answer = compile_step(tokens, tmp_path)
    thunks = launches(tmp_path)
    print(f"T={tokens}: {len(thunks)} kernels, {len(answer.executable)} bytes of code, {answer.memory}")
    assert set(thunks) == {"kCustomKernel"}, "kernels of the executable itself, and no library's"
    assert len(thunks) <= 380
    assert launches(tmp_path, "_after_thunk_passes").count("kCommandBuffer") == 1, "one graph of launches"
    assert len(answer.executable) <= code_bytes
    assert answer.memory["temporary"] <= temporary_bytes
    pool = 2 * LLAMA.num_layers * LIMITS.num_pages * 2 * LLAMA.kv_width * LIMITS.page_tokens
    assert answer.memory["aliased"] == pool, "pages are updated in place"
    assert " copy(" not in answer.optimized_hlo and "dynamic-update-slice" not in answer.optimized_hlo
    # A decoding step reads each weight once, but for the embedding, of which it looks up rows.
    if tokens == 8:
        read = WEIGHT_BYTES - 2 * LLAMA.vocab_size * LLAMA.hidden_size
        assert read <= answer.bytes_accessed <= 1.1 * read
    products = [text for text in map(Path.read_text, tmp_path.glob("*.ptx")) if re.search(r"\.entry gemm_fusion", text)]
    assert len(products) == 4 + 1, "all layers share their kernels"
    assert all(re.search(r"^\.target sm_90a", text, re.M) for text in products)
    instruction = "wgmma.mma_async" if tokens == 512 else "mma.sync"
    assert all(instruction in text for text in products)


def launches(folder: Path, passes: str = "") -> list[str]:
    """The kinds of what the device is given to do, in order, as XLA tells it."""
    (file,) = folder.glob(f"*.thunk_sequence{passes}.txt")
    return re.findall(r"^\s*\d+:\s*(k\w+)", file.read_text(), re.M)
