"""Weights by name as the arguments of graphs, without a copy where they lie in memory as prepared weights do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np

from ..compiler import xla
from ..compiler.weights import ALIGNMENT, WeightTable
from .arena import lazy_zeros
from .model import InputError, TensorSpec, check_type, to_buffer

Shares = Callable[[str, np.ndarray], Iterable[np.ndarray]]
"""From a weight's name and the whole of it to what each device has, in their order."""


def bind(
    specs: Sequence[TensorSpec], registry: Mapping[str, np.ndarray], table: WeightTable, shares: Shares | None = None
) -> dict[str, xla.Buffer]:
    """The weights that graphs want, as buffers that share the registry's memory; raises InputError for wrong ones.

    table:  what the weights called PREFIX* are regions of
    shares: on a mesh, whose graphs are those of one device
    """
    wanted = {spec.name: spec for spec in specs}
    regions = {name: _members(name, table) for name in wanted if name.endswith("*")}
    members = {member.name: member for own in regions.values() for member in own}
    missing = sorted(({*wanted, *members} - set(regions)) - set(registry))
    if missing:
        raise InputError(f"no weight was given for {', '.join(missing[:8])}", "Pass them in weights_registry by name.")
    if shares is not None:
        found = {}
        for i, (name, spec) in enumerate(wanted.items()):
            found[name] = xla.put_parts(_checked(shares, registry, spec, i))
            xla.wait([found[name]])  # so that the host holds the parts of one weight at a time
        return found
    for i, member in enumerate(members.values()):
        check_type(registry[member.name], member, i)
    given = {**registry, **{name: _region([registry[each.name] for each in own]) for name, own in regions.items()}}
    return {name: to_buffer(given[name], spec, i) for i, (name, spec) in enumerate(wanted.items())}


def _checked(
    shares: Shares, registry: Mapping[str, np.ndarray], spec: TensorSpec, position: int
) -> Iterator[np.ndarray]:
    for share in shares(spec.name, registry[spec.name]):
        check_type(share, spec, position)
        yield share


def _members(name: str, table: WeightTable) -> list[TensorSpec]:
    """The weights of a region, in the order in which it holds them."""
    own = table.region(name.removesuffix("*")).offsets
    return [TensorSpec(each.name, each.dtype, each.stored_shape) for each in table.weights if each.name in own]


def _region(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Weights as `WeightTable.region` lays them out: their own memory where they lie so in it, or else a copy."""
    starts = list(accumulate((-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts), initial=0))
    shape, memory = (starts[-1] // ALIGNMENT, ALIGNMENT), _owner(parts[0])
    first = parts[0].ctypes.data - memory.ctypes.data
    found = [(_owner(part) is memory, part.ctypes.data - memory.ctypes.data - first) for part in parts]
    if found == [(True, start) for start in starts[:-1]] and memory.nbytes >= first + starts[-1]:
        return memory.reshape(-1).view(np.uint8)[first : first + starts[-1]].reshape(shape)
    copied = lazy_zeros((starts[-1],), np.uint8)
    for part, start in zip(parts, starts, strict=False):
        copied[start : start + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    return copied.reshape(shape)


def _owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory this one shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
