"""Which checkpoint tensors a graph's weights are made of: plain data, so that it can stand in a MEF. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Weight:
    """One weight of a graph, joined from checkpoint tensors along its last axis.

    shape:      as the graph takes it; a matrix is (inputs, outputs)
    widths:     the share of each source in the last axis; empty for a single source
    transposed: the checkpoint keeps each source as (outputs, inputs), the order of torch.nn.Linear
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    widths: tuple[int, ...] = ()
    transposed: bool = False

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> WeightTable:
        weights = (
            Weight(
                row["name"], tuple(row["shape"]), tuple(row["sources"]), tuple(row["widths"]), bool(row["transposed"])
            )
            for row in value["weights"]
        )
        return WeightTable(tuple(weights), tuple(value["ignored"]))
