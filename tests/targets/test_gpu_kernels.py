"""Each GPU kernel compiled for targets that are not here: matrix instructions, no spilled register, no copied page."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from max.compiler import Graph, Target, TensorType, xla_lowering
from max.compiler.compile_messages import Answer, Job
from max.compiler.compile_process import compiling
from max.compiler.targets.toolchain import cuda_folder, missing, why_not
from max.compiler.targets.xla_options import xla_options
from max.models.gpu_kernels import make_tiles, paged_attention, rope_kv_write

HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, PAGES, LAYERS, ROWS = 32, 8, 128, 16, 64, 2, 8


@dataclass(frozen=True)
class Step:
    """What a layer's two kernels are compiled for; `matrix` is the instruction that sm_90 must multiply with."""

    dtype: str
    tokens: int
    matrix: str


STEPS = [
    Step("bfloat16", 8, "mma.sync"), Step("bfloat16", 512, "wgmma.mma_async"),
    Step("float32", 8, "fma.rn.f32"), Step("float32", 512, "fma.rn.f32"),
]  # fmt: skip

# All 255 registers of a thread are taken there.
ALLOWED = {("cuda:sm_80", "bfloat16", 512): 16}


def layer(step: Step) -> Graph:
    """The kernels of the second layer of two, between projections that are left out."""

    def forward(
        weights: dict, state: dict[str, jax.Array], qkv: jax.Array, cos: jax.Array, sin: jax.Array, slots: jax.Array,
        rows: jax.Array, positions: jax.Array, page_table: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
        tiles = make_tiles(rows, positions, max_rows=ROWS, group=HEADS // KV_HEADS)
        q, pool = rope_kv_write(qkv, cos, sin, slots, state["pool"], layer=1, num_pages=PAGES, num_heads=HEADS)
        return paged_attention(q, pool, page_table, positions, tiles, layer=1, num_pages=PAGES), {"pool": pool}

    angles, each = TensorType("float32", (step.tokens, HEAD_DIM // 2)), TensorType("int32", (step.tokens,))
    inputs = {
        "qkv": TensorType(step.dtype, (step.tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)), "cos": angles, "sin": angles,
        "slots": each, "rows": each, "positions": each, "page_table": TensorType("int32", (ROWS, 16)),
    }  # fmt: skip
    return Graph("main", forward, inputs, state={"pool": pool_type(step)})


def pool_type(step: Step) -> TensorType:
    return TensorType(step.dtype, (LAYERS * PAGES, 2, KV_HEADS, PAGE_TOKENS, HEAD_DIM))


def compile_for(target: Target, step: Step, folder: Path) -> Answer:
    """Compiles in a process apart; XLA's dumps go to the folder. Skips where the compiler is not installed."""
    if reason := why_not(target):
        pytest.skip(reason)
    if absent := missing(target):
        pytest.skip(f"{' and '.join(absent)} not installed")
    module = xla_lowering.lower(layer(step), target.xla_platform).stablehlo
    with compiling(target, 1) as process:
        process.submit(Job("main", module, xla_options(target, "main"), str(folder)))
        return process.answer()


def check_module(answer: Answer, step: Step) -> None:
    """Each kernel once, the pages written in place, nothing copied."""
    pool = pool_type(step)
    assert answer.memory["aliased"] == pool.nbytes
    queries = TensorType(step.dtype, (step.tokens, HEADS * HEAD_DIM)).nbytes
    assert answer.memory["temporary"] < queries + (2 << 20)
    hlo = answer.optimized_hlo
    assert len(re.findall(r'custom_call_target="__gpu\$xla.gpu.triton"', hlo)) == (3 if step.tokens == 8 else 2)
    shape = f"[{','.join(map(str, pool.shape))}]"
    assert not [line for line in hlo.splitlines() if " copy(" in line and shape in line]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_90", "cuda:sm_100"])
def test_kernels_for_nvidia(name: str, step: Step, tmp_path: Path) -> None:
    target = Target.parse(name)
    check_module(compile_for(target, step, tmp_path), step)
    ptx = {
        found[1]: text
        for text in (path.read_text() for path in tmp_path.glob("*.ptx"))
        if (found := re.search(r"\.entry (\w+)\(", text))
    }
    assert {"rope_kv_write", "paged_attention"} <= set(ptx)
    attention = ptx["paged_attention"]
    if step.dtype == "bfloat16":
        assert re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", attention)
        assert "cp.async" in attention, "keys are loaded ahead of their use"
    if name == "cuda:sm_90":
        assert step.matrix in attention
    for kernel in ("rope_kv_write", "paged_attention"):
        registers, spilled = resources(ptx[kernel], tmp_path)
        print(f"{name} {step.dtype} T={step.tokens} {kernel}: {registers} registers, {spilled} bytes spilled")
        assert spilled <= ALLOWED.get((name, step.dtype, step.tokens), 0)


def resources(ptx: str, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes that it keeps in memory for want of more."""
    cuda, source = cuda_folder(), folder / "one.ptx"
    assert cuda is not None
    source.write_text(ptx)
    arch = re.search(r"\.target (\w+)", ptx)
    assert arch is not None
    command = [cuda / "bin" / "ptxas", "-v", f"-arch={arch[1]}", source, "-o", folder / "one.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None and spilled is not None, said
    return int(registers[1]), int(spilled[1])


@pytest.mark.parametrize("step", STEPS[:2], ids=str)
@pytest.mark.parametrize("name", ["hip:gfx90a", "hip:gfx942", "hip:gfx1100"])
def test_kernels_for_amd(name: str, step: Step, tmp_path: Path) -> None:
    check_module(compile_for(Target.parse(name), step, tmp_path), step)
