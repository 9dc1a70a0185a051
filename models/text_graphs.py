"""The graphs of a text-generation pipeline: `step_t{T}_r{R}` for every bucket, whatever the architecture.

One ragged formulation serves prefill, chunked prefill, decode and mixed batches. A step is nothing but calls of
private functions (embed, block, and last or head), so that the compiler can make each of them once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from ..compiler import Graph, Module, TensorType
from ..compiler.limits import NEW_PAGES, Limits
from ..compiler.weights import WeightTable
from .kernel_layers import REGION, KernelLayers
from .kernels import argmax, attention, lazy_zeros, why_no_attention
from .layers import split_heads
from .paged_attention import Tiles, make_tiles, paged_attention, write_pages
from .rope import Rope, rope_tables, rotate

logger = logging.getLogger(__name__)

Weights = dict[str, jax.Array]
_Context = tuple[jax.Array, jax.Array, Tiles | None]
"""What every block needs of the step: cosines, sines, and the tiles of attention without a kernel."""
_Step = Callable[[Weights, Weights, Weights], tuple[Any, Weights]]
"""From weights, state and inputs by name to the outputs and the new state."""
_PAGES = "pages.{}"
_EMBED_INPUTS = ("tokens", "token_src", "prev_ids", "positions", "rows", "lengths")
_BLOCK_INPUTS = ("slots", "rows", "positions", "page_table")
_LAST_TOKENS = 128
"""Tokens from which on the last block has code of its own: below, it would save less than its compilation takes."""


class DecoderConfig(Protocol):
    """What a step needs to know of a decoder's config."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope(self) -> Rope: ...


@dataclass(frozen=True)
class Bound:
    """An abstract nnx module whose parameters are filled from flat weights; unfilled ones must not be used."""

    definition: Any
    state: Any

    @staticmethod
    def of(module: nnx.Module) -> Bound:
        return Bound(*nnx.split(module))

    def fill(self, weights: Mapping[str, jax.Array]) -> Any:
        """The module with the named parameters (paths joined by dots) replaced; NAME.0, NAME.1, ... become a tuple."""
        flat = []
        for path, param in nnx.to_flat_state(self.state):
            name = ".".join(map(str, path))
            parts = tuple(weights[part] for at in range(len(weights)) if (part := f"{name}.{at}") in weights)
            value = weights.get(name, parts)
            flat.append((path, param if isinstance(value, tuple) and not value else param.replace(value)))
        return nnx.merge(self.definition, nnx.from_flat_state(flat))


def page_shape(config: DecoderConfig, pages: int, page_tokens: int) -> tuple[int, ...]:
    return (pages, 2, config.num_kv_heads, page_tokens, config.head_dim)


def _kernel_attends(config: DecoderConfig) -> bool:
    """Whether the attention kernel takes the model; says in the log why not."""
    problem = why_no_attention(config.head_dim)
    if problem is not None:
        logger.warning("attention is computed by plain XLA: %s", problem)
    return problem is None


def step_inputs(limits: Limits, tokens: int, rows: int) -> dict[str, TensorType]:
    """The inputs of a step of `tokens` tokens that gives `rows` rows of logits, as `StepBuilder.add` describes them."""
    shapes = {
        "tokens": (tokens,),
        "token_src": (tokens,),
        "prev_ids": (limits.max_batch,),
        "positions": (tokens,),
        "rows": (tokens,),
        "slots": (tokens,),
        "page_table": (limits.max_batch, limits.max_pages),
        "lengths": (limits.max_batch,),
        "logit_rows": (rows,),
    }
    return {name: TensorType("int32", shape) for name, shape in shapes.items()}


def step_ids(given: Mapping[str, jax.Array]) -> jax.Array:
    """The step's tokens, (T,) int32: those that the host knows, and those that are still on the device."""
    source = given["token_src"]
    # A row that gave no token has -1: its request fails when that is known, and until then reads token 0.
    before = jnp.maximum(given["prev_ids"], 0)
    return jnp.where(source >= 0, before[jnp.maximum(source, 0)], given["tokens"])


class StepBuilder:
    """Adds step graphs of one decoder to a module."""

    def __init__(self, decoder: nnx.Module, config: DecoderConfig, limits: Limits, table: WeightTable) -> None:
        """decoder: abstract (`nnx.eval_shape`), with `embed_tokens`, `blocks` and `logits` as in llama.py.
        table: its weights; packed matrices are for the CPU kernels, which compute attention too where they can."""
        self.config, self.limits, self.has_kernels = config, limits, table.is_packed
        self.attends_by_kernel = table.is_packed and _kernel_attends(config)
        self.weights = {weight.name: TensorType(weight.dtype, weight.stored_shape) for weight in table.weights}
        self.whole = Bound.of(decoder)
        self.block = Bound.of(decoder.blocks[0])  # type: ignore[attr-defined]
        self.outer = [name for name in self.weights if not name.startswith("blocks.")]
        pages = TensorType(limits.page_format, page_shape(config, limits.num_pages, limits.page_tokens))
        self.state = {_PAGES.format(layer): pages for layer in range(config.num_layers)}
        self._parts: dict[str, Callable[..., Any]] = {}
        self._layers = (
            KernelLayers.of(decoder.blocks[0], config.num_layers, config.num_heads, table)  # type: ignore[attr-defined]
            if self.attends_by_kernel
            else None
        )

    def add(self, module: Module, tokens: int, rows: int) -> Graph:
        """Adds the step of `tokens` tokens that gives `rows` rows of logits.

        Inputs, all int32: tokens (T,); token_src (T,), the index in prev_ids (B,), the sampler's last output, of a
        token that is still on the device, or -1; positions (T,); rows (T,), -1 for padding; slots (T,); page_table
        (B, max_pages); lengths (B,) after this step; logit_rows (R,), the tokens whose logits are wanted.
        Outputs: logits (R, V) float32; and where the kernels decode, in steps of at most a batch, ids (B,) int32, the
        likeliest token of each row, or -1, as `sample_greedy` has them.
        """
        name, inputs = f"step_t{tokens}_r{rows}", step_inputs(self.limits, tokens, rows)
        decodes = self.attends_by_kernel and tokens <= self.limits.max_batch
        step, weights = self._step(tokens, rows), self.weights
        if decodes and self._layers is not None:
            step, weights = self._decoding_step(self._layers, tokens, rows), self._layers.weights(self.weights)

        def by_name(weights: Weights, state: Weights, *values: jax.Array) -> tuple[Any, Weights]:
            logits, new_state = step(weights, state, dict(zip(inputs, values, strict=True)))
            return (logits, self._likeliest(logits)) if decodes else logits, new_state

        # The steps of decoding are short: 26 calls are a fiftieth of one of 15 ms, and more of those of small models.
        return Graph(
            name,
            by_name,
            inputs,
            weights=weights,
            state=self.state,
            outputs=("logits", "ids") if decodes else ("logits",),
            module=module,
            is_whole=decodes,
        )

    def _likeliest(self, logits: jax.Array) -> jax.Array:
        """What `sample_greedy` would give: a call of its own takes longer where steps are short."""
        return jnp.pad(argmax(logits), (0, self.limits.max_batch - logits.shape[0]))

    def _step(self, tokens: int, rows: int) -> _Step:
        """A step of parts that other steps have too."""
        embed, block, head = self._embed(tokens), self._block(tokens), self._head(tokens, rows)
        last = self._last(tokens, rows) if tokens >= _LAST_TOKENS and rows < tokens else None

        def step(weights: Weights, state: Weights, given: Weights) -> tuple[jax.Array, Weights]:
            outer = {name: weights[name] for name in self.outer}
            x, context = embed(outer, {name: given[name] for name in _EMBED_INPUTS})
            block_inputs = {name: given[name] for name in _BLOCK_INPUTS}
            new_state = {}
            for layer in range(self.config.num_layers):
                prefix, pages = f"blocks.{layer}.", _PAGES.format(layer)
                own = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
                call = (own, state[pages], x, context, block_inputs)
                if last is not None and layer == self.config.num_layers - 1:
                    logits, new_state[pages] = last(outer, *call, given["logit_rows"])
                    return logits, new_state
                x, new_state[pages] = block(*call)
            return head(outer, x, given["logit_rows"]), new_state

        return step

    def _decoding_step(self, layers: KernelLayers, tokens: int, rows: int) -> _Step:
        """A step whose layers are one call."""
        embed, head = self._embed(tokens), self._head(tokens, rows)

        def step(weights: Weights, state: Weights, given: Weights) -> tuple[jax.Array, Weights]:
            outer = {name: weights[name] for name in self.outer}
            x, (cos, sin, _) = embed(outer, {name: given[name] for name in _EMBED_INPUTS})
            x, pages = layers(weights[REGION], list(state.values()), x, cos, sin, given)
            return head(outer, x, given["logit_rows"]), dict(zip(state, pages, strict=True))

        return step

    def add_pages(self, module: Module) -> Graph:
        """Adds the graph that makes the pages, zeros in memory of the device that may be donated."""
        like = [jax.ShapeDtypeStruct(type.shape, type.dtype) for type in self.state.values()]

        def zeros() -> tuple[jax.Array, ...]:
            return tuple(lazy_zeros(like) if self.has_kernels else [jnp.zeros(each.shape, each.dtype) for each in like])

        return Graph(NEW_PAGES, zeros, {}, outputs=tuple(self.state), module=module)

    # Each part is jitted, so that it is lowered to a function of its own, once, and called; and kept, so that steps of
    # the same tokens share its trace.

    def _embed(self, tokens: int) -> Callable[..., Any]:
        def embed(weights: Weights, given: Weights) -> tuple[jax.Array, _Context]:
            lengths = given["lengths"][jnp.maximum(given["rows"], 0)]
            cos, sin = rope_tables(self.config.rope, given["positions"], lengths)
            x = self.whole.fill(weights).embed_tokens(step_ids(given))
            tiles = None if self.attends_by_kernel else make_tiles(given["rows"], self.limits.max_batch)
            return x, (cos, sin, tiles)

        return self._part(f"embed_t{tokens}", embed)

    def _block(self, tokens: int) -> Callable[..., Any]:
        def block(
            weights: Weights, pages: jax.Array, x: jax.Array, context: _Context, given: Weights
        ) -> tuple[jax.Array, jax.Array]:
            return self._layer(weights, pages, x, context, given)

        return self._part(f"block_t{tokens}", block)

    def _last(self, tokens: int, rows: int) -> Callable[..., Any]:
        """The last block and the head in one: all tokens leave keys and values, and what follows is of R rows alone."""

        def last(
            outer: Weights, weights: Weights, pages: jax.Array, x: jax.Array, context: _Context, given: Weights,
            logit_rows: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
            x, written = self._layer(weights, pages, x, context, given, logit_rows)
            return self.whole.fill(outer).logits(x), written

        return self._part(f"last_t{tokens}_r{rows}", last)

    def _head(self, tokens: int, rows: int) -> Callable[..., Any]:
        def head(weights: Weights, x: jax.Array, logit_rows: jax.Array) -> jax.Array:
            return self.whole.fill(weights).logits(x[logit_rows])

        return self._part(f"head_t{tokens}_r{rows}", head)

    def _layer(
        self, weights: Weights, pages: jax.Array, x: jax.Array, context: _Context, given: Weights,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """A block over a step's tokens, x: (T, D), and the pages with what it wrote; see `llama.Block` for `wanted`."""
        config, (cos, sin, tiles), written = self.config, context, pages
        slots, rows, positions, page_table = (given[name] for name in _BLOCK_INPUTS)

        def attend(qkv: jax.Array) -> jax.Array:
            nonlocal written
            if self.attends_by_kernel:
                out, written = attention(qkv, pages, cos, sin, page_table, rows, positions, slots)
                return out
            assert tiles is not None
            q, k, v = split_heads(qkv, config.num_heads, config.num_kv_heads, config.head_dim)
            written = write_pages(pages, rotate(k, cos, sin), v, slots)
            return paged_attention(rotate(q, cos, sin), written, page_table, rows, positions, tiles)

        x = self.block.fill(weights)(x, attend, wanted)
        return x, written

    def _part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if name not in self._parts:
            function.__name__ = name
            self._parts[name] = jax.jit(function)
        return self._parts[name]
