"""Triton's dialect in a context of MLIR."""

from __future__ import annotations

import sys

from jaxlib.mlir import ir
from jaxlib.triton import dialect as tt


def register(context: ir.Context) -> None:
    """Makes the dialect known to the context, and its Python module to MLIR's bindings.

    They look for `jaxlib.mlir.dialects.tt` whenever they meet a type of Triton, and remember only what they find: the
    search through all paths was two thirds of the time of building a kernel.
    """
    sys.modules.setdefault("jaxlib.mlir.dialects.tt", tt)
    tt.register_dialect(context)
