"""Graphs of JAX functions, their grouping in one MLIR module, and the compilation of modules for targets.

Importing this package loads neither jax nor jaxlib: a warm start needs `compiler.xla` only.
"""

import os

# Tracing needs no device: jax must not look for accelerators, nor warn that there are none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# jaxlib's C++ side logs every start and compilation at INFO; it reads this when it is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from .graph import Graph, Module, TensorType
from .targets import Target

__all__ = ["Graph", "Module", "Target", "TensorType"]
