"""GPU kernels as Triton IR: written in Python, compiled by XLA inside our graphs, interpreted by numpy in tests."""

from .kernel import Kernel

__all__ = ["Kernel"]
