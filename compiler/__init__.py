"""Graphs of JAX functions, their grouping in one MLIR module, and the compilation of modules for targets.

Importing this package loads neither jax nor jaxlib: a warm start needs `compiler.xla` only.
"""

import os

# Tracing needs no device: jax must not look for accelerators, nor warn that there are none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from .graph import Graph, Module, TensorType
from .target import Target

__all__ = ["Graph", "Module", "Target", "TensorType"]
