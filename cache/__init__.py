"""Compiled artifacts on disk: keys, their container, the bindings to checkpoints, and the store that keeps them."""
