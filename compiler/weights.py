"""Which checkpoint tensors a graph's weights are made of: plain data, so that it can stand in a MEF. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from .. import ConfigError

Packing = Literal["", "float32", "bfloat16", "q8_0"]
PANEL_COLUMNS = 32
Q8_BLOCK = 32
"""Inputs that share a scale in q8_0."""


def packed_bytes(packing: Packing, inputs: int, outputs: int, *, gated: bool = False) -> int:
    """The bytes of a packed matrix: panels of 32 outputs, of 16 gates and 16 ups in a gated one.

    bfloat16 lies by pairs of inputs; q8_0 takes inputs in blocks of 32, 34 bytes for each output. Raises ConfigError
    for inputs that are no whole blocks.
    """
    if packing == "q8_0" and inputs % Q8_BLOCK:
        raise ConfigError(
            f"q8_0 needs widths that are multiples of {Q8_BLOCK}, and the model has one of {inputs}",
            "Use --quantization-encoding bfloat16 or float32.",
        )
    panels = -(-(outputs // 2) // (PANEL_COLUMNS // 2)) if gated else -(-outputs // PANEL_COLUMNS)
    per_column = {"float32": 4 * inputs, "bfloat16": 4 * -(-inputs // 2), "q8_0": inputs // Q8_BLOCK * 34}[packing]
    return panels * PANEL_COLUMNS * per_column


@dataclass(frozen=True)
class Weight:
    """One weight of a graph, joined from checkpoint tensors along its last axis.

    shape:      as the graph takes it; a matrix is (inputs, outputs)
    widths:     the share of each source in the last axis; empty for a single source
    transposed: the checkpoint keeps each source as (outputs, inputs), the order of torch.nn.Linear
    gated:      its two sources are the gate and the up projection of a gated layer
    packed:     the encoding of its panels for the CPU kernels; float32 in rows where it is empty
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    widths: tuple[int, ...] = ()
    transposed: bool = False
    gated: bool = False
    packed: Packing = ""

    @property
    def dtype(self) -> str:
        """As the graph takes it: packed weights are opaque bytes."""
        return "uint8" if self.packed else "float32"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As the graph takes it: packed weights have a size that depends on shape and encoding only."""
        if not self.packed:
            return self.shape
        inputs, outputs = self.shape
        return (packed_bytes(self.packed, inputs, outputs, gated=self.gated),)

    def source_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each source tensor's name with the shape that it must have in the checkpoint."""
        for source, width in zip(self.sources, self.widths or (self.shape[-1],), strict=True):
            shape = (*self.shape[:-1], width)
            yield source, shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class WeightTable:
    """All weights of a pipeline; `ignored` are patterns of checkpoint tensors that may be there and are not read."""

    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()

    def ignores(self, tensor: str) -> bool:
        return any(fnmatchcase(tensor, pattern) for pattern in self.ignored)

    def pack(self, packing: Packing) -> WeightTable:
        """The same weights with every matrix packed for the CPU kernels."""
        weights = (replace(weight, packed=packing) if weight.transposed else weight for weight in self.weights)
        return WeightTable(tuple(weights), self.ignored)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> WeightTable:
        weights = (
            Weight(
                row["name"],
                tuple(row["shape"]),
                tuple(row["sources"]),
                tuple(row["widths"]),
                bool(row["transposed"]),
                bool(row["gated"]),
                row["packed"],
            )
            for row in value["weights"]
        )
        return WeightTable(tuple(weights), tuple(value["ignored"]))
