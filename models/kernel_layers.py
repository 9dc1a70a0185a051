"""The layers of a decoding step as one call of a kernel, where it takes them.

A step of few tokens is over in milliseconds, and reads more weights than the caches hold: what XLA keeps of each call
and argument comes from memory every time, a microsecond for each of hundreds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from ..compiler import TensorType
from ..compiler.panels import Packing
from ..compiler.weights import Region, WeightTable
from .kernels import LAYER_WEIGHTS, Gate, decoder_layers

_PREFIX = "blocks."
REGION = f"{_PREFIX}*"
"""The weight of a step that holds those of all layers."""


class Block(Protocol):
    """A decoder layer that the kernel knows: `layer_gate` is the activation of its gate, None for any other layer."""

    layer_gate: Gate | None
    norm_eps: float
    widths: tuple[int, int, int]


@dataclass(frozen=True)
class KernelLayers:
    """All layers of a decoder, with `widths` of a block: those of qkv, of the residual stream and of the MLP."""

    table: WeightTable
    region: Region
    block: Block
    num_layers: int
    num_heads: int

    @staticmethod
    def of(block: Any, num_layers: int, num_heads: int, table: WeightTable) -> KernelLayers | None:
        """None where the kernel does not take layers with these weights."""
        if getattr(block, "layer_gate", None) is None:
            return None
        names = [f"{_PREFIX}{layer}.{name}" for layer in range(num_layers) for name in LAYER_WEIGHTS]
        found = {weight.name: weight for weight in table.weights if weight.name.startswith(_PREFIX)}
        if set(names) != set(found):
            return None  # biases, or matrices in parts of several encodings
        if any(bool(weight.packed) == name.endswith("_norm") for name, weight in found.items()):
            return None
        return KernelLayers(table, table.region(_PREFIX), block, num_layers, num_heads)

    def weights(self, all_weights: Mapping[str, TensorType]) -> dict[str, TensorType]:
        """Those of a step, in which the layers' are one."""
        outer = {name: type for name, type in all_weights.items() if not name.startswith(_PREFIX)}
        return {**outer, REGION: TensorType("uint8", self.region.shape)}

    def __call__(
        self, weights: jax.Array, pages: Sequence[jax.Array], x: jax.Array, cos: jax.Array, sin: jax.Array,
        given: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
        """The residual stream behind the layers, and their pages; `given`: inputs of the step by name."""
        assert self.block.layer_gate is not None
        packed: dict[str, Packing] = {weight.name: weight.packed for weight in self.table.weights}
        names = [f"{_PREFIX}{layer}.{name}" for layer in range(self.num_layers) for name in LAYER_WEIGHTS]
        return decoder_layers(
            x, weights, pages, cos, sin, *(given[name] for name in ("page_table", "rows", "positions", "slots")),
            offsets=[self.region.offsets[name] for name in names],
            encodings=[packed[name] for name in names if packed[name]],
            heads=self.num_heads,
            mlp_width=self.block.widths[2],
            gate=self.block.layer_gate,
            eps=self.block.norm_eps,
        )  # fmt: skip
