"""What the devices of a mesh do together: operations of JAX, as plain StableHLO over all replicas of a program.

A program for a mesh is written for one of its devices, and every device runs it on its own part of weights and pages
(docs/adr/0016-meshes-are-replicas.md). XLA makes NVIDIA's collectives of these operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

_all_reduce, _all_gather, _index = (Primitive(f"mesh_{name}") for name in ("all_reduce", "all_gather", "index"))


def all_reduce(x: jax.Array, devices: int) -> jax.Array:
    """The sum over all devices, on each of them."""
    return x if devices == 1 else _all_reduce.bind(x, devices=devices)


def all_gather(x: jax.Array, devices: int) -> jax.Array:
    """The parts of all devices side by side along the last axis, on each of them."""
    return x if devices == 1 else _all_gather.bind(x, devices=devices)


def device_index() -> jax.Array:
    """Which device of the mesh computes, () int32."""
    return _index.bind()


@_all_reduce.def_abstract_eval
def _same(x: Any, *, devices: int) -> Any:
    return ShapedArray(x.shape, x.dtype)


@_all_gather.def_abstract_eval
def _wider(x: Any, *, devices: int) -> Any:
    return ShapedArray((*x.shape[:-1], x.shape[-1] * devices), x.dtype)


@_index.def_abstract_eval
def _number() -> Any:
    return ShapedArray((), np.dtype("int32"))


def _lower_all_reduce(context: mlir.LoweringRuleContext, x: Any, *, devices: int) -> Sequence[Any]:
    operation = stablehlo.AllReduceOp([x.type], [x], replica_groups=_everyone(devices))
    scalar = ir.RankedTensorType.get([], x.type.element_type)
    sum_of = operation.regions[0].blocks.append(scalar, scalar)
    with ir.InsertionPoint(sum_of):
        stablehlo.return_([stablehlo.add(*sum_of.arguments)])
    return operation.results


def _lower_all_gather(context: mlir.LoweringRuleContext, x: Any, *, devices: int) -> Sequence[Any]:
    (wider,) = context.avals_out
    result = ir.RankedTensorType.get(wider.shape, x.type.element_type)  # type: ignore[union-attr]
    last = len(wider.shape) - 1  # type: ignore[union-attr]
    return stablehlo.AllGatherOp([result], [x], all_gather_dim=last, replica_groups=_everyone(devices)).results


def _lower_index(context: mlir.LoweringRuleContext) -> Sequence[Any]:
    result = ir.RankedTensorType.get([], ir.IntegerType.get_signless(32))
    return [stablehlo.convert(result, stablehlo.replica_id())]


def _everyone(devices: int) -> Any:
    return ir.DenseIntElementsAttr.get(np.arange(devices, dtype=np.int64)[None])


for _primitive, _lower in ((_all_reduce, _lower_all_reduce), (_all_gather, _lower_all_gather), (_index, _lower_index)):
    mlir.register_lowering(_primitive, _lower)
