"""The step graphs of a text-generation pipeline for GPUs: a step is one executable, and so one graph of launches.

The inputs and outputs are those of text_graphs.py. What differs is how memory is cut: the pages of all layers are one
pool that is updated in place. Keys and values are written, attention is computed and activations are normed by kernels
that travel inside the graph as Triton IR. Layers differ in their arguments only, so that XLA compiles each kernel once
for all of them. For a mesh of devices the graph is that of one of them: config, weights and pages are its part.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ..compiler import Graph, Module, TensorType
from ..compiler.limits import NEW_PAGES, Limits
from ..compiler.weights import WeightTable
from .gpu_kernels import NORMS, make_tiles, paged_attention, rope_kv_write
from .rope import rope_tables
from .text_graphs import Bound, DecoderConfig, Weights, page_shape, step_ids, step_inputs

_POOL, _BLOCK = "pages", "blocks.{}."

_Context = tuple[jax.Array, jax.Array, jax.Array]
"""What every block needs of the step: cosines, sines, and the tiles of attention."""


class GpuStepBuilder:
    """Adds step graphs of one decoder to a module."""

    def __init__(
        self, decoder: nnx.Module, config: DecoderConfig, limits: Limits, table: WeightTable, devices: int = 1
    ) -> None:
        """decoder: abstract (`nnx.eval_shape`), with `embed_tokens`, `blocks` and `logits` as in llama.py.
        table: the weights, by output; their element is what the step computes in. devices: of the mesh; decoder and
        config are those of one part."""
        assert table.is_by_output, "GPUs take matrices as the checkpoint has them"
        self.config, self.limits = config, limits
        self.weights = {weight.name: TensorType(weight.dtype, weight.part_shape(devices)) for weight in table.weights}
        self.by_output = {weight.name for weight in table.weights if weight.by_output}
        # Where float32 is asked for, products are not rounded to the 10 bits of TF32.
        self.precision = "highest" if table.weights[0].element == "float32" else "default"
        self.whole = Bound.of(decoder)
        self.block = Bound.of(decoder.blocks[0])  # type: ignore[attr-defined]
        shape = page_shape(config, config.num_layers * limits.num_pages, limits.page_tokens)
        self.state = {_POOL: TensorType(limits.page_format, shape)}
        self._blocks: dict[int, Callable[..., tuple[jax.Array, jax.Array]]] = {}

    def add(self, module: Module, tokens: int, rows: int) -> Graph:
        """Adds the step of `tokens` tokens that gives `rows` rows of logits; see `StepBuilder.add`."""
        inputs, block = step_inputs(self.limits, tokens, rows), self._block(tokens)

        def step(weights: Weights, state: Weights, *values: jax.Array) -> tuple[jax.Array, Weights]:
            given = dict(zip(inputs, values, strict=True))
            with jax.default_matmul_precision(self.precision):
                outer = self._turned(weights, "")
                x = self.whole.fill(outer).embed_tokens(step_ids(given))
                pool, context = state[_POOL], self._context(given)
                for layer in range(self.config.num_layers):
                    own = self._turned(weights, _BLOCK.format(layer))
                    x, pool = block(own, pool, x, context, jnp.int32(layer), given)
                return self.whole.fill(outer).logits(x[given["logit_rows"]]), {_POOL: pool}

        name = f"step_t{tokens}_r{rows}"
        return Graph(name, step, inputs, weights=self.weights, state=self.state, outputs=("logits",), module=module)

    def add_pages(self, module: Module) -> Graph:
        """Adds the graph that makes the pool, zeros in memory of the device."""
        pool = self.state[_POOL]
        return Graph(NEW_PAGES, lambda: (jnp.zeros(pool.shape, pool.dtype),), {}, outputs=(_POOL,), module=module)

    def _turned(self, weights: Weights, prefix: str) -> Weights:
        """The weights of this prefix without it, matrices as architectures take them, (inputs, outputs): XLA reads
        them transposed where it multiplies."""
        own = [name for name in weights if name.startswith(prefix)]
        return {name.removeprefix(prefix): weights[name].T if name in self.by_output else weights[name] for name in own}

    def _context(self, given: Weights) -> _Context:
        lengths = given["lengths"][jnp.maximum(given["rows"], 0)]
        cos, sin = rope_tables(self.config.rope, given["positions"], lengths)
        return cos, sin, self._tiles(given)

    def _tiles(self, given: Weights) -> jax.Array:
        group = self.config.num_heads // self.config.num_kv_heads
        return make_tiles(given["rows"], given["positions"], max_rows=self.limits.max_batch, group=group)

    def _block(self, tokens: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """A layer of steps of so many tokens; jitted, so that it is traced once and not per layer."""

        def block(
            weights: Weights, pool: jax.Array, x: jax.Array, context: _Context, layer: jax.Array, given: Weights
        ) -> tuple[jax.Array, jax.Array]:
            cos, sin, tiles = context
            written, at = pool, {"layer": layer, "num_pages": self.limits.num_pages}

            def attend(qkv: jax.Array) -> jax.Array:
                nonlocal written
                q, written = rope_kv_write(qkv, cos, sin, given["slots"], pool, num_heads=self.config.num_heads, **at)
                return paged_attention(q, written, given["page_table"], given["positions"], tiles, **at)

            x = self.block.fill(weights)(x, attend, norms=NORMS)
            return x, written

        if tokens not in self._blocks:
            block.__name__ = f"block_t{tokens}"
            self._blocks[tokens] = jax.jit(block)
        return self._blocks[tokens]
