"""What modules are compiled for: platforms, their architectures, and what compiling for them takes."""

from .cpu_features import host_features
from .target import Target, target_names

__all__ = ["Target", "host_features", "target_names"]
