"""From an architecture's config and the pipeline's sizes to a module of graphs. Imported on a cache miss only."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from flax import nnx

from ..compiler import Module
from ..compiler.limits import Limits
from ..compiler.weights import WeightTable
from . import llama
from .gpu_text_graphs import GpuStepBuilder
from .sampler import add_samplers
from .text_graphs import StepBuilder

_DECODERS: dict[str, tuple[ModuleType, str]] = {"LlamaForCausalLM": (llama, "Llama")}


def build_text_pipeline(architecture: str, config: Any, limits: Limits, table: WeightTable, devices: int = 1) -> Module:
    """The steps of every token bucket and the samplers of every row bucket, for a decoder of this architecture.

    table: the config's weights; where matrices are packed the CPU kernels compute, else plain XLA
    devices: of the mesh that the module is for; the graphs are those of one device
    """
    file, class_name = _DECODERS[architecture]
    part = config.part(devices)
    decoder = nnx.eval_shape(lambda: getattr(file, class_name)(part, rngs=nnx.Rngs(0), devices=devices))
    module = Module(architecture)
    if table.is_by_output:
        builder = GpuStepBuilder(decoder, part, limits, table, devices)
    else:
        assert devices == 1, "meshes are of GPUs, which compute by kernels of their own"
        builder = StepBuilder(decoder, config, limits, table)
    builder.add_pages(module)
    for tokens in limits.token_buckets:
        for rows in limits.logit_rows(tokens):
            builder.add(module, tokens, rows)
    draws = "cpu" if table.is_packed else "gpu" if table.is_by_output else "xla"
    for rows in limits.row_buckets:
        add_samplers(module, rows, config.vocab_size, limits.max_batch, draws)
    return module
