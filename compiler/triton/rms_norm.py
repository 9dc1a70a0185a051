"""The kernels of the root-mean-square norm, alone or behind a residual sum. A program has a token.

XLA makes another kernel of each layer's norm, with whatever stands around it; one that all layers share is compiled
once, and where it takes the sum in, a layer has a launch fewer. Source: arXiv:1910.07467.
"""

from __future__ import annotations

import functools

from ..graph import TensorType
from . import operations as op
from .block import Block
from .kernel import Kernel, build

_LANES_PER_WARP, _MAX_WARPS = 512, 16


@functools.cache
def rms_norm_kernel(x: TensorType, weight: TensorType, eps: float, *, adds: bool) -> Kernel:
    """The norm of x (T, D), computed in float32, times weight (D,).

    Operands: x; with `adds` what is added to it, of its type; weight. Results, as x: with `adds` the sum; the norm.
    """
    tokens, width = x.shape
    lanes = 1 << (width - 1).bit_length()

    def body(x_at: Block, *pointers: Block) -> None:
        delta_at, weight_at, total_at, out_at = pointers if adds else (None, pointers[0], None, pointers[1])
        lane = op.arange(lanes)
        inside, at = lane < width, op.program_id(0) * width + lane
        row = op.load(x_at + at, inside).to("float32")
        if delta_at is not None and total_at is not None:
            total = (row + op.load(delta_at + at, inside).to("float32")).to(x.dtype)  # type: ignore[arg-type]
            op.store(total_at + at, total, inside)
            row = total.to("float32")
        scale = op.rsqrt((row * row).sum(0) / width + eps)
        normed = (row * scale).to(x.dtype).to("float32")  # type: ignore[arg-type]
        scaled = normed * op.load(weight_at + lane, inside).to("float32")
        op.store(out_at + at, scaled.to(x.dtype), inside)  # type: ignore[arg-type]

    warps = min(_MAX_WARPS, max(1, lanes // _LANES_PER_WARP))
    operands, results = [*[x] * (1 + adds), weight], [x] * (1 + adds)
    return build("add_rms_norm" if adds else "rms_norm", operands, results, body, grid=(tokens, 1, 1), num_warps=warps)
