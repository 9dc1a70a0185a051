"""Which checkpoint tensors a graph's weights are made of: plain data, so that it can stand in a MEF. Imports no jax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from .panels import PANEL_COLUMNS, Packing, bits_of, packed_shape, packs

if TYPE_CHECKING:
    import numpy as np

Element = Literal["float32", "bfloat16"]
"""What a weight that is not packed is made of."""

Split = Literal["", "outputs", "inputs"]
"""Along which axis the devices of a mesh share a weight; empty where each has all of it."""

ALIGNMENT = 4096
"""Of each weight in memory, in bytes: more than the 64 that jax needs to share it, and what direct reads need."""


@dataclass(frozen=True)
class Weight:
    """One weight of a graph, joined from checkpoint tensors along the axis of its outputs.

    shape:      as the graph takes it; a matrix is (inputs, outputs), or (outputs, inputs) if `by_output`
    widths:     the share of each source in the outputs; empty for a single source
    transposed: the checkpoint keeps each source as (outputs, inputs), the order of torch.nn.Linear
    by_output:  a matrix as the checkpoint has it, (outputs, inputs), which the graph transposes
    gated:      its two sources are the gate and the up projection of a gated layer
    packed:     the encoding of its panels for the CPU kernels
    element:    of a weight that is not packed
    split:      how the devices of a mesh share it; along the outputs, each has its part of every source
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    widths: tuple[int, ...] = ()
    transposed: bool = False
    gated: bool = False
    packed: Packing = ""
    by_output: bool = False
    element: Element = "float32"
    split: Split = ""

    @property
    def dtype(self) -> str:
        """As the graph takes it: packed weights are opaque bytes."""
        return "uint8" if self.packed else self.element

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As the graph takes it: packed weights have a shape that depends on the matrix and its encoding only."""
        if not self.packed:
            return self.shape
        inputs, outputs = self.shape
        return packed_shape(self.packed, inputs, outputs, gated=self.gated)

    def part_shape(self, devices: int) -> tuple[int, ...]:
        """What one device of a mesh has of it."""
        shape = list(self.stored_shape)
        if self.split and devices > 1:
            assert not self.packed, "weights are packed for CPUs, and meshes are of other devices"
            shape[self._split_axis] //= devices
        return tuple(shape)

    def part(self, array: np.ndarray, device: int, devices: int) -> np.ndarray:
        """That part of an array of `stored_shape`: a view where its bytes lie together, else a copy.

        Along the outputs, a device has the same share of each source: of queries, keys and values, say.
        """
        if not self.split or devices == 1:
            return array
        import numpy as np

        axis, start, slices = self._split_axis, 0, []
        widths = self.widths if self.split == "outputs" and self.widths else (array.shape[axis],)
        for width in widths:
            share = width // devices
            index = (slice(None),) * axis + (slice(start + device * share, start + (device + 1) * share),)
            slices.append(array[index])
            start += width
        return np.ascontiguousarray(slices[0]) if len(slices) == 1 else np.concatenate(slices, axis)

    @property
    def nbytes(self) -> int:
        """As it lies in memory."""
        return math.prod(self.stored_shape) * (1 if self.packed else {"float32": 4, "bfloat16": 2}[self.element])

    def places(self) -> Iterator[tuple[str, tuple[int, ...], tuple[Any, ...]]]:
        """Each source tensor: its name, its shape in the checkpoint, and the index of its place in the weight."""
        start = 0
        for source, width in zip(self.sources, self.widths or (self.shape[self._joined],), strict=True):
            share = slice(start, start + width)
            if self.transposed:
                yield source, (width, *self.shape[-2::-1]), (..., share)
            else:
                yield source, (width, *self.shape[1:]), (share,)
            start += width

    def source_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each source tensor's name with the shape that it must have in the checkpoint."""
        for source, shape, _ in self.places():
            yield source, shape

    @property
    def _joined(self) -> int:
        """The axis of the outputs."""
        return -1 if self.transposed else 0

    @property
    def _split_axis(self) -> int:
        """The axis that devices share."""
        last = len(self.shape) - 1
        outputs = last if self.transposed else 0
        return outputs if self.split == "outputs" else last - outputs


def _fitting(packing: Packing, inputs: int) -> Packing:
    """The encoding, or q8_0 where rows are too narrow for q4_k or q6_k, as llama.cpp has it for q6_k."""
    return "q8_0" if packing in ("q4_k", "q6_k") and not packs(packing, inputs) else packing


def _packed(weight: Weight, packing: Packing, own: Mapping[str, Packing]) -> Iterator[Weight]:
    """The weight packed, in parts where its matrices have several encodings."""
    if not packing or not weight.transposed:
        yield weight
        return
    inputs = weight.shape[0]
    encodings: list[Packing] = [_fitting(own.get(source, packing), inputs) for source in weight.sources]
    # A part's outputs are told from its size, so that panels must be full; a matrix that would not fill them takes the
    # encoding that keeps all of its parts' values best.
    if len(set(encodings)) == 1 or any(width % PANEL_COLUMNS for width in weight.widths):
        yield replace(weight, packed=max(encodings, key=bits_of))
        return
    parts = zip(encodings, weight.sources, weight.widths, strict=True)
    for index, (encoding, run) in enumerate(groupby(parts, key=itemgetter(0))):
        _, sources, widths = zip(*run, strict=True)
        shape = (inputs, sum(widths))
        yield Weight(f"{weight.name}.{index}", shape, sources, widths, transposed=True, packed=encoding)


def _by_output(weight: Weight) -> Weight:
    if not weight.transposed:
        return weight
    return replace(weight, shape=weight.shape[::-1], transposed=False, by_output=True)


@dataclass(frozen=True)
class Region:
    """Weights that follow each other in memory: the byte at which each begins behind the first one, and all bytes.

    A graph can take a region as one weight of `shape`, uint8, called PREFIX*: each argument costs a step a microsecond,
    and layers have many.
    """

    offsets: Mapping[str, int]
    nbytes: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.nbytes // ALIGNMENT, ALIGNMENT


@dataclass(frozen=True)
class WeightTable:
    """All weights of a pipeline; `ignored` are patterns of checkpoint tensors that may be there and are not read."""

    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()

    def ignores(self, tensor: str) -> bool:
        return any(fnmatchcase(tensor, pattern) for pattern in self.ignored)

    @property
    def is_packed(self) -> bool:
        """Whether any matrix is packed for the CPU kernels."""
        return any(weight.packed for weight in self.weights)

    def pack(self, packing: Packing, own: Mapping[str, Packing] | None = None) -> WeightTable:
        """The same weights with every matrix packed for the CPU kernels, or all as they are if `packing` is empty.

        own: checkpoint tensors that keep another encoding, with that. A weight that joins matrices of several encodings
             becomes as many weights as there are runs of equal ones: NAME.0, NAME.1, ...
        Matrices too narrow for the blocks of q4_k or q6_k are packed as q8_0.
        """
        weights = [part for weight in self.weights for part in _packed(weight, packing, own or {})]
        return WeightTable(tuple(weights), self.ignored)

    def others(self, packing: Packing) -> dict[str, Packing]:
        """The matrices that are not packed as `packing` but otherwise, by name."""
        return {weight.name: weight.packed for weight in self.weights if weight.packed and weight.packed != packing}

    def split(self, sharding: Mapping[str, Split]) -> WeightTable:
        """The same weights with the axes that devices share, by the last part of their names; others are whole."""
        weights = (replace(each, split=sharding.get(each.name.rpartition(".")[2], "")) for each in self.weights)
        return replace(self, weights=tuple(weights))

    def made_of(self, element: Element) -> WeightTable:
        """The same weights, those that are not packed made of another element."""
        return replace(self, weights=tuple(replace(weight, element=element) for weight in self.weights))

    def by_output(self) -> WeightTable:
        """The same weights, every matrix in the orientation of the checkpoint, as GPUs take it; nothing is packed."""
        return replace(self, weights=tuple(map(_by_output, self.weights)))

    @property
    def is_by_output(self) -> bool:
        return any(weight.by_output for weight in self.weights)

    def region(self, prefix: str) -> Region:
        """Where the weights whose names begin so lie, as memory holds them: each at the next multiple of ALIGNMENT."""
        offsets, stop = {}, 0
        for weight in self.weights:
            if weight.name.startswith(prefix):
                offsets[weight.name] = stop
                stop += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
        return Region(offsets, stop)

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
                bool(row["by_output"]),
                row["element"],
                row["split"],
            )
            for row in value["weights"]
        )
        return WeightTable(tuple(weights), tuple(value["ignored"]))
