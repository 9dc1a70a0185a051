"""A checkpoint on a mesh of CPU devices, in a process of its own: `mesh_side.py FOLDER DEVICES` answers on stdout.

Reads {"prompt": ids, "new": count} and writes {"logits": of the prompt, "answer": ids, "stamp": ..., "shapes": ...} as
JSON. All is as on a mesh of GPUs but the two kernels, which are the plain operations that tests compare them with: code
that is kept as bytes cannot call back into their interpreter.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from max.cache import mef
from max.compiler import Target, xla
from max.compiler.artifact import Options, compile_module
from max.compiler.limits import Limits
from max.models import build, gpu_text_graphs, layers, sampler
from max.models.layers import split_heads
from max.models.llama_config import Config
from max.models.paged_attention import make_tiles, paged_attention, write_pages
from max.models.rope import rotate
from max.runtime.arena import Arena
from max.runtime.checkpoint import Checkpoint
from max.runtime.engine import Engine
from max.runtime.prepared import layout_of, prepare_into
from max.runtime.request import Generation, Request
from max.runtime.sampling import SamplingParams
from max.runtime.scheduler import Chunk
from max.runtime.session import CompiledModels, InferenceSession
from max.runtime.step_inputs import StepWriter
from max.runtime.step_results import Token

LIMITS = Limits(max_length=176, max_batch=64, page_tokens=16, num_pages=60, token_buckets=(8, 64))


def write(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, slots: jax.Array, pool: jax.Array, *, num_heads: int, **at: Any
) -> tuple[jax.Array, jax.Array]:
    q, k, v = split_heads(qkv, num_heads, pool.shape[2], pool.shape[4])
    first_slot = at["layer"] * at["num_pages"] * pool.shape[3]
    return rotate(q, cos, sin), write_pages(pool, rotate(k, cos, sin), v, slots + first_slot)


def attend(
    q: jax.Array, pool: jax.Array, table: jax.Array, positions: jax.Array, rows: jax.Array, **at: Any
) -> jax.Array:
    table = table + at["layer"] * at["num_pages"]
    return paged_attention(q, pool, table, rows, positions, make_tiles(rows, LIMITS.max_batch))


def load(folder: Path, devices: int) -> tuple[Config, CompiledModels, dict[str, Any]]:
    """Compiles the checkpoint for the mesh and loads it there."""
    gpu_text_graphs.rope_kv_write = write  # type: ignore[assignment]
    gpu_text_graphs.paged_attention = attend  # type: ignore[assignment]
    build.add_samplers = lambda *about: sampler.add_samplers(*about[:4])  # type: ignore[assignment]
    gpu_text_graphs.NORMS = layers.NORMS  # type: ignore[misc]
    gpu_text_graphs.make_tiles = lambda rows, positions, **_: rows
    if devices > 1:
        xla.use_client(lambda: xla.jaxlib().make_cpu_client(num_devices=devices), devices)
    target = replace(Target.parse("cpu"), topology=f"1x1x{devices}")
    checkpoint = Checkpoint.open(folder)
    config = Config.from_hf(checkpoint.config)
    table = config.weights().by_output().split(config.sharding(devices))
    buffer = io.BytesIO()
    module = build.build_text_pipeline(checkpoint.architecture, config, LIMITS, table, devices)
    compile_module(module, target, mef.MefWriter(buffer), Options(weights=table.to_json()))
    compiled = CompiledModels(mef.Mef.from_bytes(buffer.getvalue()))
    session = InferenceSession()
    session.target = target
    whole = prepare_into(table, checkpoint, Arena(layout_of(table)), threads=1)
    return config, compiled, session.init_all(compiled, whole)


def main() -> None:
    asked = json.load(sys.stdin)
    config, compiled, models = load(Path(sys.argv[1]), int(sys.argv[2]))
    prompt = asked["prompt"]
    row = Generation(Request("row", prompt), prompt, row=1, pages=list(range(2, 2 + LIMITS.max_pages)))
    inputs = StepWriter(LIMITS).write([Chunk.of(row, len(prompt))])
    (rows,) = inputs.arrays[-1].shape
    last = np.clip(np.arange(len(prompt) - rows, len(prompt), dtype=np.int32), 0, None)
    logits = models[inputs.graph](*inputs.arrays[:-1], last)[0].to_numpy()[-len(prompt) :]
    engine = Engine(models, LIMITS, config.vocab_size)
    engine.add(Request("a", prompt, SamplingParams(temperature=0), max_new_tokens=asked["new"]))
    answer: list[int] = []
    while not engine.is_idle:
        answer += [token.id for token in engine.step() if isinstance(token, Token)]
    step = compiled.graphs[inputs.graph]
    shapes = {spec.name: spec.shape for spec in (*step.weights, *step.state)}
    stamp = compiled.artifact.json(mef.COMPAT)
    print(json.dumps({"logits": logits.tolist(), "answer": answer, "stamp": stamp, "shapes": shapes}))


if __name__ == "__main__":
    main()
