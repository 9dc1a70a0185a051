"""The graphs of a text-generation pipeline: `step_t{T}_r{R}` for every bucket, whatever the architecture.

One ragged formulation serves prefill, chunked prefill, decode and mixed batches. A step is nothing but calls of three
private functions (embed, block, head), so that the compiler can make each of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from ..compiler import Graph, Module, TensorType
from ..compiler.limits import NEW_PAGES, Limits
from ..compiler.weights import WeightTable
from .kernels import attention, lazy_zeros
from .layers import split_heads
from .paged_attention import Tiles, make_tiles, paged_attention, write_pages
from .rope import Rope, rope_tables, rotate

Weights = dict[str, jax.Array]
_Context = tuple[jax.Array, jax.Array, Tiles | None]
"""What every block needs of the step: cosines, sines, and the tiles of attention without a kernel."""
_PAGES = "pages.{}"
_EMBED_INPUTS = ("tokens", "token_src", "prev_ids", "positions", "rows", "lengths")


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


def _page_shape(config: DecoderConfig, pages: int, page_tokens: int) -> tuple[int, ...]:
    return (pages, 2, config.num_kv_heads, page_tokens, config.head_dim)


class StepBuilder:
    """Adds step graphs of one decoder to a module."""

    def __init__(self, decoder: nnx.Module, config: DecoderConfig, limits: Limits, table: WeightTable) -> None:
        """decoder: abstract (`nnx.eval_shape`), with `embed_tokens`, `blocks` and `logits` as in llama.py.
        table: its weights; packed matrices are for the CPU kernels, which then compute attention too."""
        self.config, self.limits, self.uses_kernels = config, limits, table.is_packed
        self.weights = {weight.name: TensorType(weight.dtype, weight.stored_shape) for weight in table.weights}
        self.whole = Bound.of(decoder)
        self.block = Bound.of(decoder.blocks[0])  # type: ignore[attr-defined]
        self.outer = [name for name in self.weights if not name.startswith("blocks.")]
        pages = TensorType(limits.page_format, _page_shape(config, limits.num_pages, limits.page_tokens))
        self.state = {_PAGES.format(layer): pages for layer in range(config.num_layers)}
        self._parts: dict[str, Callable[..., Any]] = {}

    def add(self, module: Module, tokens: int, rows: int) -> Graph:
        """Adds the step of `tokens` tokens that gives `rows` rows of logits.

        Inputs, all int32: tokens (T,); token_src (T,), the index in prev_ids (B,), the sampler's last output, of a
        token that is still on the device, or -1; positions (T,); rows (T,), -1 for padding; slots (T,); page_table
        (B, max_pages); lengths (B,) after this step; logit_rows (R,), the tokens whose logits are wanted.
        Output: logits (R, V) float32.
        """
        limits, name = self.limits, f"step_t{tokens}_r{rows}"
        inputs = {
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
        embed, block = self._embed(tokens), self._block(tokens)
        head = self._head(tokens, rows)

        def step(weights: Weights, state: Weights, *values: jax.Array) -> tuple[jax.Array, Weights]:
            given = dict(zip(inputs, values, strict=True))
            outer = {name: weights[name] for name in self.outer}
            x, context = embed(outer, {name: given[name] for name in _EMBED_INPUTS})
            new_state = {}
            for layer in range(self.config.num_layers):
                prefix, pages = f"blocks.{layer}.", _PAGES.format(layer)
                own = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
                call = (given["slots"], given["rows"], given["positions"], given["page_table"])
                x, new_state[pages] = block(own, state[pages], x, context, *call)
            return head(outer, x, given["logit_rows"]), new_state

        types = {name: TensorType("int32", shape) for name, shape in inputs.items()}
        return Graph(name, step, types, weights=self.weights, state=self.state, outputs=("logits",), module=module)

    def add_pages(self, module: Module) -> Graph:
        """Adds the graph that makes the pages, zeros in memory of the device that may be donated."""
        like = [jax.ShapeDtypeStruct(type.shape, type.dtype) for type in self.state.values()]
        return Graph(NEW_PAGES, lambda: tuple(lazy_zeros(like)), {}, outputs=tuple(self.state), module=module)

    # Each part is jitted, so that it is lowered to a function of its own, once, and called; and kept, so that steps of
    # the same tokens share its trace.

    def _embed(self, tokens: int) -> Callable[..., Any]:
        def embed(weights: Weights, given: Weights) -> tuple[jax.Array, _Context]:
            source = given["token_src"]
            ids = jnp.where(source >= 0, given["prev_ids"][jnp.maximum(source, 0)], given["tokens"])
            lengths = given["lengths"][jnp.maximum(given["rows"], 0)]
            cos, sin = rope_tables(self.config.rope, given["positions"], lengths)
            x = self.whole.fill(weights).embed_tokens(ids)
            tiles = None if self.uses_kernels else make_tiles(given["rows"], self.limits.max_batch)
            return x, (cos, sin, tiles)

        return self._part(f"embed_t{tokens}", embed)

    def _block(self, tokens: int) -> Callable[..., Any]:
        config = self.config

        def block(
            weights: Weights,
            pages: jax.Array,
            x: jax.Array,
            context: _Context,
            slots: jax.Array,
            rows: jax.Array,
            positions: jax.Array,
            page_table: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            cos, sin, tiles = context
            written = pages

            def attend(qkv: jax.Array) -> jax.Array:
                nonlocal written
                if self.uses_kernels:
                    out, written = attention(qkv, pages, cos, sin, page_table, rows, positions, slots)
                    return out
                assert tiles is not None
                q, k, v = split_heads(qkv, config.num_heads, config.num_kv_heads, config.head_dim)
                written = write_pages(pages, rotate(k, cos, sin), v, slots)
                return paged_attention(rotate(q, cos, sin), written, page_table, rows, positions, tiles)

            x = self.block.fill(weights)(x, attend)
            return x, written

        return self._part(f"block_t{tokens}", block)

    def _head(self, tokens: int, rows: int) -> Callable[..., Any]:
        def head(weights: Weights, x: jax.Array, logit_rows: jax.Array) -> jax.Array:
            return self.whole.fill(weights).logits(x[logit_rows])

        return self._part(f"head_t{tokens}_r{rows}", head)

    def _part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if name not in self._parts:
            function.__name__ = name
            self._parts[name] = jax.jit(function)
        return self._parts[name]
