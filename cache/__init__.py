"""Compiled artifacts on disk: keys, their container, the bindings to checkpoints, and the store that keeps them."""

from .binding import Binding
from .key import Key
from .mef import Mef
from .store import Store

__all__ = ["Binding", "Key", "Mef", "Store"]
