"""Compiled artifacts on disk: keys, their container, the bindings to checkpoints, and the store that keeps them."""

from .key import Key
from .mef import Mef

__all__ = ["Key", "Mef"]
